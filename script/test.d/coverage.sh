# Which lines regression, isolation and TAP tests run: by file, then the lines that none of them does. Sourced by script/test.
# The library is built without optimization. What a process that is killed has run is not counted.
run_coverage() {
	local work=$work/coverage PG_BIN= PATH=$PATH KV_COPT='--coverage -O0' file
	local make_options=(SHLIB_LINK='-lcurl -lcrypto --coverage')
	mkdir -m 755 "$work"
	prepare
	run_regress
	run_tap
	cd "$work/src" || die 'the sources are gone'
	for file in src/*.c src/*/*.c; do
		[ -e "${file%.c}.gcda" ] || { echo "never loaded: $file"; continue; }
		gcov -t "${file%.c}.gcda" 2> /dev/null | awk -F: -v file="$file" '
			$3 == "Source" { own = ($4 == file) }
			own && $1 ~ /#####|=====/ { missed++; print file ":" $2 + 0 ":" $3 > "/dev/stderr" }
			own && $1 ~ /[0-9]/ { run++ }
			END { printf "%6.1f %%  %4d of %4d lines  %s\n", 100 * run / (run + missed), run, run + missed, file }'
	done > "$work/lines" 2> "$work/missed"
	cd - > /dev/null
	sort -n "$work/lines"
	awk '{ run += $3; all += $5 } END { printf "%6.1f %%  %d of %d lines\n", 100 * run / all, run, all }' "$work/lines"
	echo
	cat "$work/missed"
}
