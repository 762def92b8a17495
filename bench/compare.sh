# Interleaved pgbench runs, sourced by the benchmarks.
# Settings: KV_BENCH_ROUNDS (default 7), KV_BENCH_SECONDS a run (default 5: each run begins with cold caches).

# The CPUs of this process, and the first of them.
cpus=$(taskset -pc $$ | sed 's/.*: //')
one_cpu=${cpus%%[,-]*}

# pin CPUS: where this process and backends that start from now on run.
pin() {
	local postmaster
	postmaster=$(head -1 "$(psql -XqAt -c 'SHOW data_directory')/postmaster.pid")
	taskset -pc "$1" "$postmaster" > /dev/null
	taskset -pc "$1" $$ > /dev/null
}

tps() {
	pgbench -n -M prepared -T "${KV_BENCH_SECONDS:-5}" "$@" | sed -n 's/^tps = \([0-9.]*\).*/\1/p'
}

# compare TITLE BASELINE.sql SCRIPT.sql [PGBENCH-OPTION ...]
# Runs the two in turn and prints the median of the ratios of neighbours, with its range. A single client and its backend
# take turns: they do so on one CPU, or the time would be that of waking another, which jumps from run to run.
compare() {
	local title=$1 baseline=$2 script=$3 round
	shift 3
	case " $* " in *' -c 1 '*) pin "$one_cpu" ;; *) pin "$cpus" ;; esac
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
	pin "$cpus"
}
