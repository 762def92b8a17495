# Regression, isolation and TAP tests with keyvault built with AddressSanitizer and UndefinedBehaviorSanitizer. Sourced by script/test.
# A report of theirs ends the process that it is about, so that a test fails as well. The server itself is Debian's: an overflow inside
# one of its memory blocks, from one palloc chunk into the next, is not seen here but by "script/test valgrind".
# A signal that a test sends is not reported: a crash fails the test anyway.
run_sanitize() {
	local work=$work/sanitize PG_BIN= PATH=$PATH KV_COPT='-fsanitize=address,undefined -fno-sanitize-recover=all -O1 -g -fno-omit-frame-pointer'
	local make_options=(CC=gcc SHLIB_LINK='-lcurl -lcrypto -fsanitize=address,undefined') runtime
	export KV_SANITIZER=1
	mkdir -p -m 777 "$work" "$work/reports"
	chmod 777 "$work/reports"
	prepare
	gcc -shared -fPIC -Wl,-z,initfirst -o "$work/early.so" test/sanitize/early.c || die 'test/sanitize/early.c does not build'
	runtime=$(realpath "$(gcc -print-file-name=libasan.so)")
	wrap_server "$PG_BIN" "LD_PRELOAD='$runtime $work/early.so'" \
		"ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:disable_coredump=0:handle_segv=0:detect_stack_use_after_return=0:log_path=$work/reports/report" \
		"UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1:log_path=$work/reports/report"

	make_cluster "$work/cluster" test/keyvault.conf
	start_cluster "$work/cluster"
	# UndefinedBehaviorSanitizer would see these two first.
	plant "$work/cluster" $KV_COPT -fno-sanitize=bounds,object-size
	finds "$work/cluster" 'planted_heap(16)' heap-buffer-overflow
	finds "$work/cluster" 'planted_stack(16)' stack-buffer-overflow
	finds "$work/cluster" 'planted_undefined(1)' 'signed integer overflow'
	stop_cluster "$work/cluster"
	rm -rf "$work/cluster"

	run_regress
	run_tap
	no_reports sanitize
}

# wrap_server BIN VARIABLE=VALUE ...: have the server, and nothing else, run with these in its environment.
wrap_server() {
	local bin=$1
	shift
	mv "$bin/postgres" "$bin/postgres.bin"
	printf '#!/bin/bash\nexport %s\nexec -a "$0" "%s/postgres.bin" "$@"\n' "$*" "$bin" > "$bin/postgres"
	chmod 755 "$bin/postgres"
}

# plant CLUSTER FLAG ...: build the planted defects and make SQL functions of them.
plant() {
	local cluster=$1 library function
	shift
	library=$("$PG_BIN/pg_config" --pkglibdir)/keyvault_planted.so
	gcc -shared -fPIC -O1 -g "$@" -I"$("$PG_BIN/pg_config" --includedir-server)" -o "$library" test/sanitize/planted.c || die 'test/sanitize/planted.c does not build'
	for function in planted_heap planted_stack planted_undefined planted_uninitialised; do
		echo "CREATE FUNCTION $function(int) RETURNS int LANGUAGE c STRICT AS 'keyvault_planted';"
	done | "$PG_BIN/psql" -Xq -h "$cluster" -U postgres -d postgres
}

# finds CLUSTER CALL TEXT: a planted defect ends in a report with this text, which is then removed.
finds() {
	"$PG_BIN/psql" -Xq -h "$1" -U postgres -d postgres -c "SELECT $2" > "$work/planted.log" 2>&1
	if reports | grep "$3" > /dev/null; then
		count "$2" 1 0
	else
		cat "$work/planted.log"
		count "$2" 0 1
	fi
	rm -f "$work"/reports/*
	: > "$1/server.log"
	wait_for_server "$1"
}

# The server restarts after a crash of a backend.
wait_for_server() {
	local i
	for i in $(seq 600); do
		! "$PG_BIN/psql" -Xq -h "$1" -U postgres -d postgres -c 'SELECT 1' > /dev/null 2>&1 || return 0
		sleep 0.1
	done
	die 'the server does not come back'
}

# What was reported: AddressSanitizer has files of its own, UndefinedBehaviorSanitizer writes into the server's logs.
reports() {
	find "$work/reports" -type f -exec cat {} +
	grep -hs -A 20 ': runtime error: ' "$work"/cluster/server.log "$work"/src/tmp_check/log/*.log || true
}

# no_reports PART: nothing was reported.
no_reports() {
	local found
	found=$(reports | grep -cE 'ERROR: AddressSanitizer|: runtime error: ')
	reports | head -n 300
	count "$1" "$((found == 0))" "$found"
}
