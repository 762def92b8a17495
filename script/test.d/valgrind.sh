# Regression and isolation tests with the server under valgrind's memcheck: minutes, so by hand. Sourced by script/test.
# Debian's server does not tell memcheck where a palloc chunk ends, so that an overflow from one into the next goes unseen. One that does
# is made of PostgreSQL's source, with contrib/pgcrypto and src/test/isolation installed too, by
#   ./configure --prefix=DIR --enable-cassert --with-openssl --with-lz4 CFLAGS='-O1 -g -DUSE_VALGRIND'
# and used with KV_VALGRIND_SERVER=DIR.
run_valgrind() {
	local work=$work/valgrind PG_BIN= PATH=$PATH KV_COPT='-g -O1'
	command -v valgrind > /dev/null || die 'valgrind is not installed'
	mkdir -p -m 777 "$work/reports"
	chmod 777 "$work/reports"
	export PGCTLTIMEOUT=600
	[ -z "${KV_VALGRIND_SERVER:-}" ] || own_server "$KV_VALGRIND_SERVER"
	prepare
	. script/test.d/sanitize.sh
	mv "$PG_BIN/postgres" "$PG_BIN/postgres.bin"
	# What initdb runs is not of interest.
	cat > "$PG_BIN/postgres" <<-WRAPPER
		#!/bin/sh
		case \$1 in
			--boot | --single | --check | -V | --version | -C) exec "$PG_BIN/postgres.bin" "\$@" ;;
		esac
		exec valgrind --quiet --leak-check=no --error-limit=no --num-callers=30 --suppressions=$work/src/test/sanitize/valgrind.supp \\
			--log-file=$work/reports/%p "$PG_BIN/postgres.bin" "\$@" -c jit=off
	WRAPPER
	chmod 755 "$PG_BIN/postgres"

	make_cluster "$work/cluster" test/keyvault.conf
	start_cluster "$work/cluster"
	plant "$work/cluster"
	memcheck_finds "$work/cluster" 'planted_heap(16)' 'Invalid write'
	memcheck_finds "$work/cluster" 'planted_uninitialised(17)' 'uninitialised'
	stop_cluster "$work/cluster"
	rm -rf "$work/cluster" "$work"/reports/*
	run_regress
	no_errors
}

# own_server DIR: what prepare does, with a copy of the server in a folder.
own_server() {
	cp -r "$1" "$work/tree"
	export PG_BIN=$work/tree/bin PATH=$work/tree/bin:$PATH
	copy_sources "$work/src"
	build_into_tree "$work/src" COPT="$KV_COPT" || die 'keyvault does not build'
}

# memcheck_finds CLUSTER CALL TEXT: a planted defect is reported.
memcheck_finds() {
	"$PG_BIN/psql" -Xq -h "$1" -U postgres -d postgres -c "SELECT $2" > "$work/planted.log" 2>&1
	if cat "$work"/reports/* | grep -A 3 "$3" | grep planted.c: > /dev/null; then
		count "$2" 1 0
	else
		cat "$work/planted.log"
		count "$2" 0 1
	fi
}

# no_errors: none with keyvault among the callers; others are counted only.
no_errors() {
	local all ours files
	# An error is a paragraph.
	sed -s 's/^==[0-9]*== *//' "$work"/reports/* | awk -v RS= -v ORS='\n\n' '/(^|\n)at 0x/' > "$work/errors"
	files=$(cd src && printf '%s|' *.c */*.c | sed 's#[a-z]*/##g; s#\.c|#|#g; s#|$##')
	awk -v RS= -v ORS='\n\n' "/\/keyvault\.so|\(($files)\.c:[0-9]+\)/" "$work/errors" > "$work/ours"
	all=$(grep -c '^at 0x' "$work/errors" || true)
	ours=$(grep -c '^at 0x' "$work/ours" || true)
	head -n 200 "$work/ours"
	echo "$all reports in all, $ours with keyvault among the callers"
	count valgrind "$((ours == 0))" "$ours"
}
