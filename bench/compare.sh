# Interleaved pgbench runs, sourced by the benchmarks.
# Settings: KV_BENCH_ROUNDS (default 7), KV_BENCH_SECONDS a run (default 5: each run begins with cold caches).

tps() {
	pgbench -n -M prepared -T "${KV_BENCH_SECONDS:-5}" "$@" | sed -n 's/^tps = \([0-9.]*\).*/\1/p'
}

# compare TITLE BASELINE.sql SCRIPT.sql [PGBENCH-OPTION ...]
# Runs the two in turn and prints the median of the ratios of neighbours, with its range.
compare() {
	local title=$1 baseline=$2 script=$3 round
	shift 3
	tps "$@" -f "$baseline" > /dev/null
	tps "$@" -f "$script" > /dev/null
	for ((round = 0; round < ${KV_BENCH_ROUNDS:-7}; round++)); do
		echo "$(tps "$@" -f "$baseline") $(tps "$@" -f "$script")"
	done | awk -v title="$title" '
		{ ratio[NR] = $2 / $1; base += $1; ours += $2 }
		END {
			for (i = 2; i <= NR; i++)
				for (j = i; j > 1 && ratio[j] < ratio[j - 1]; j--) { t = ratio[j]; ratio[j] = ratio[j - 1]; ratio[j - 1] = t }
			printf "%-58s ratio %.2f  (%.2f to %.2f; about %.4g and %.4g per second)\n", title,
				ratio[int((NR + 1) / 2)], ratio[1], ratio[NR], base / NR, ours / NR
		}'
}
