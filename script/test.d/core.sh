# PostgreSQL's own regression tests, on a server with keyvault preloaded and created in the database that they run in. What
# fails there is held against the same test on a server without keyvault: only what differs counts as failed, so that
# tests of another minor version than the server's do no harm. Sourced by script/test.

# What keyvault changes, as it should: the test, and what each line that it adds to the test's output looks like. The first
# are statements with EXECUTE or with U&", of which keyvault cannot tell that they carry no key: see "Logs" in
# doc/keyvault.md. The last two look at every table and at every C function there is; of
# pgcrypto's, which is there without keyvault, too, the plan decides in which order.
withheld='(ERROR|HINT):  (message withheld by keyvault|The SQLSTATE and the position tell what is wrong).*'
declare -A core_explained=([domain]=$withheld [encoding]=$withheld [functional_deps]=$withheld [partition_prune]=$withheld [plancache]=$withheld
	[prepare]=$withheld [strings]=$withheld [updatable_views]=$withheld [xml]=$withheld
	[type_sanity]='.*(usage_records|ciphertext|relname|attrelid| row|--).*' [opr_sanity]='.*(uuidv7|gen_random_uuid|rows\)).*')

# core_is_explained TEST DIFF: does keyvault add only what it should?
core_is_explained() {
	[ -n "${core_explained[$1]:-}" ] && ! grep -E '^\+' "$2" | grep -v '^+++' | grep -qvxE "\\+(${core_explained[$1]})"
}

# core_sources: where PostgreSQL's tests are, or nothing when they cannot be had.
core_sources() {
	if [ -n "${KEYVAULT_SUITE:-}" ]; then
		echo "${KEYVAULT_CORE:-}"
	else
		script/suite source "$PG_MAJOR" "$(dpkg-query -W -f '${source:Version}' "postgresql-$PG_MAJOR")" 2> "$work/core_source.log"
	fi
}

# core_run NAME OPTION ...: run them all on the cluster in $work/NAME. What they put out is in $work/NAME/out/results.
core_run() {
	local name=$1
	shift
	start_cluster "$work/$name"
	as_postgres mkdir -p "$work/$name/out"
	as_postgres env -C "$work/core" PATH="$PATH" PGHOST="$work/$name" PGUSER=postgres "$PG_PGXS/src/test/regress/pg_regress" --inputdir="$work/core" \
		--outputdir="$work/$name/out" --dlpath="$work/core" --bindir="$PG_BIN" --max-concurrent-tests=20 \
		--schedule="$work/core/parallel_schedule" "$@" > "$work/$name.log" 2>&1
	stop_cluster "$work/$name" immediate
}

run_core() {
	local sources library test passed_here=0 failed_tests=() differ=0
	prepare
	sources=$(core_sources)
	if [ -z "$sources" ]; then
		echo "PostgreSQL $PG_MAJOR's own tests cannot be had here: passed over"
		tail -n 3 "$work/core_source.log" 2> /dev/null
		return
	fi
	PG_PGXS=$(dirname "$("$PG_BIN/pg_config" --pgxs)")/../..
	cp -r "$sources/src/test/regress" "$work/core"
	for library in autoinc refint; do
		cp "$("$PG_BIN/pg_config" --pkglibdir)/$library.so" "$work/core"
	done
	gcc -O2 -fPIC -shared -I"$("$PG_BIN/pg_config" --includedir-server)" -o "$work/core/regress.so" "$work/core/regress.c" || die 'regress.c does not compile'
	[ "$(id -u)" != 0 ] || chown -R postgres "$work/core"
	printf 'fsync = off\nmax_wal_size = 4GB\n' > "$work/core.conf"

	make_cluster "$work/core_with" "$work/core.conf"
	core_run core_with --load-extension=pgcrypto --load-extension=keyvault
	passed_here=$(matches '^(test .* \.\.\. ok|     .* \.\.\. ok|ok [0-9]+ )' "$work/core_with.log")
	mapfile -t failed_tests < <(sed -nE 's/^(test)? *([a-z0-9_]+) +\.\.\. FAILED.*/\2/p; s/^not ok [0-9]+ +[-+] +([a-z0-9_]+) .*/\1/p' "$work/core_with.log")
	if [ ${#failed_tests[@]} -gt 0 ]; then
		make_cluster "$work/core_without" "$work/core.conf"
		echo "shared_preload_libraries = ''" | as_postgres tee -a "$work/core_without/data/postgresql.conf" > /dev/null
		core_run core_without --load-extension=pgcrypto
		for test in "${failed_tests[@]}"; do
			if diff -u --label "$test without keyvault" --label "$test with keyvault" \
				"$work/core_without/out/results/$test.out" "$work/core_with/out/results/$test.out" > "$work/core.diff" ||
				core_is_explained "$test" "$work/core.diff"; then
				passed_here=$((passed_here + 1))
			else
				differ=$((differ + 1))
				head -n 60 "$work/core.diff"
			fi
		done
	fi
	[ $((passed_here + differ)) -gt 0 ] || { tail -n 20 "$work/core_with.log"; differ=1; }
	count core "$passed_here" "$differ"
}
