# The Debian package and the PGXN bundle: built, looked at, installed into private trees, and used. Sourced by script/test.
# Nothing is installed into the system but what building takes.
run_package() {
	local work=$work/package version
	version=$(sed -n "s/^default_version *= *'\(.*\)'.*/\1/p" keyvault.control)
	mkdir -m 755 "$work"
	script/bootstrap package || die 'what packaging needs could not be installed'
	check 'the Debian package builds' build_debian
	check '... and has the files it should' debian_files
	check '... and works' in_tree debian install_debian
	if command -v lintian > /dev/null; then
		check '... and lintian has no complaint' lintian_passes
	fi
	check 'make dist makes the PGXN bundle' build_bundle
	check '... and it works' in_tree pgxn install_bundle
}

# check NAME COMMAND ...: count a command as a test; what it prints matters when it fails.
check() {
	local name=$1
	shift
	if "$@" > "$work/check.log" 2>&1; then
		count "$name" 1 0
	else
		tail -n 40 "$work/check.log"
		count "$name" 0 1
	fi
}

build_debian() {
	copy_sources "$work/deb/src"
	[ "$(id -u)" != 0 ] || chown postgres "$work/deb"
	as_postgres env -C "$work/deb/src" dpkg-buildpackage -b -us -uc
}

debian_files() {
	local root=./usr/share/postgresql/$PG_MAJOR/extension file missing=0
	dpkg-deb --fsys-tarfile "$(package_file)" | tar t > "$work/files"
	for file in "./usr/lib/postgresql/$PG_MAJOR/lib/keyvault.so" "$root/keyvault.control" "$root/keyvault--$version.sql" \
		"./usr/share/doc/postgresql-doc-$PG_MAJOR/extension/keyvault.md.gz" "./usr/share/doc/postgresql-$PG_MAJOR-keyvault/README.Debian" \
		$(cd sql && printf "$root/%s " keyvault--*--*.sql); do
		grep -qxF "$file" "$work/files" || { echo "missing: $file"; missing=1; }
	done
	# Nothing else, and no test or source.
	! grep -vE "/$|/lib/(bitcode/|keyvault\.so$)|/extension/keyvault|/doc/postgresql-$PG_MAJOR-keyvault/" "$work/files" && [ $missing = 0 ]
}

package_file() {
	ls "$work/deb/postgresql-$PG_MAJOR-keyvault_"*.deb
}

lintian_passes() {
	# It closes no bug that asks for the package: it is not Debian's own.
	as_postgres lintian --no-cfg --fail-on error,warning --suppress-tags initial-upload-closes-no-bugs "$work"/deb/*.changes
}

install_debian() {
	dpkg-deb -x "$(package_file)" "$1"
}

build_bundle() {
	# What is not committed yet is part of it here.
	make -s dist DIST_TREE="$(git stash create)" DIST_DIR="$work" && unzip -q "$work/keyvault-$version.zip" -d "$work" && [ -f "$work/keyvault-$version/META.json" ]
}

install_bundle() {
	[ "$(id -u)" != 0 ] || chown -R postgres "$work/keyvault-$version"
	build_into_tree "$work/keyvault-$version"
}

# in_tree NAME COMMAND: have the command install into a private tree, which it is given, and use keyvault there.
in_tree() {
	local directory=$work/$1 PG_BIN= PATH=$PATH status=0
	mkdir -p "$directory"
	private_tree "$directory/tree"
	"$2" "$directory/tree" || return 1
	make_cluster "$directory/cluster"
	start_cluster "$directory/cluster"
	uses_keyvault "$directory/cluster" || status=1
	stop_cluster "$directory/cluster"
	return $status
}

uses_keyvault() {
	local got
	got=$("$PG_BIN/psql" -XqAt -v ON_ERROR_STOP=1 -h "$1" -U postgres -d postgres <<-'SQL'
		SET client_min_messages = warning;
		CREATE EXTENSION keyvault CASCADE;
		SELECT extversion FROM pg_extension WHERE extname = 'keyvault';
		SELECT keyvault.store_api_key('openai', 'sk-proj-key-of-a-package', user_id => 'a') IS NOT NULL;
		SELECT keyvault.user_api_keys('a');
		INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES ('a', 'chat', 2.5);
		SELECT credits_used FROM keyvault.credit_status WHERE user_id = 'a';
		DROP EXTENSION keyvault;
	SQL
	) || return 1
	diff <(printf '%s\n' "$version" t '{"openai": "sk-proj-key-of-a-package"}' 2.500000) <(echo "$got")
}
