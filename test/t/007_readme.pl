# Every SQL block of the README runs, in order, on a fresh database.
use strict;
use warnings FATAL => 'all';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my @blocks = slurp_file('README.md') =~ /^```sql\n(.*?)^```/msg;
cmp_ok(scalar @blocks, '>=', 2, 'the README has SQL blocks');

my $port = start_mock();
my $node = new_node('readme', init_only => 1);
$node->start;
my $number = 0;
foreach my $block (@blocks)
{
	$number++;
	# The call would go to the provider itself: send it to the stand-in.
	$node->safe_psql('postgres', "UPDATE keyvault.providers SET base_url = 'http://127.0.0.1:$port', allowed_host = '127.0.0.1'")
	  if $block =~ /keyvault\.(call|request)\(/;
	my ($code, $out, $err) = $node->psql('postgres', $block, on_error_stop => 1);
	is($code, 0, "block $number runs") or diag($err);
	# What a comment under a statement shows is what comes back.
	while ($block =~ /^-- (.+)$/mg)
	{
		(my $shown = $1) =~ s/ \| /|/g;
		like($out, qr/^\Q$shown\E$/m, "block $number: $shown");
	}
}
$node->stop;

done_testing();
