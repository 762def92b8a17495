# The parsers under libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer: each for 20 seconds, or KV_FUZZ_SECONDS, as many
# at a time as there are processors. Sourced by script/test. A run begins from, and adds to, the corpora in the folder
# KV_FUZZ_CORPUS, if that is set.
run_fuzz() {
	local work=$work/fuzz seconds=${KV_FUZZ_SECONDS:-20} targets=(record wrap box env_file master_key reference secret_text) target
	local corpus=${KV_FUZZ_CORPUS:-$work/corpus}
	mkdir -p "$work" "$corpus"
	for target in "${targets[@]}"; do
		build_target "$target"
		seed_target "$target" "$corpus/$target"
	done
	finds_planted "$corpus/env_file"
	for target in "${targets[@]}"; do
		while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do
			wait -n
		done
		fuzz_target "$target" "$corpus/$target" "$seconds" &
	done
	wait
	for target in "${targets[@]}"; do
		report_target "$target"
	done
}

# What each target is made of, besides itself and the stand-in for the server.
fuzzed_sources() {
	local aead='src/crypto/aead.c src/crypto/openssl_error.c src/crypto/associated_data.c src/base/secret.c'
	case $1 in
		record) echo "src/crypto/envelope.c $aead" ;;
		wrap) echo "src/crypto/data_key_wrap.c $aead" ;;
		box) echo "src/crypto/sealed_box.c $aead" ;;
		env_file) echo src/vault/env_file.c ;;
		master_key) echo "src/crypto/master_key.c $aead" ;;
		reference) echo src/vault/key_reference.c ;;
		secret_text) echo src/base/secret_text.c ;;
	esac
}

# build_target TARGET [NAME FLAG ...]: what the sources have beyond the parsers is left unresolved, and never called.
build_target() {
	local target=$1 name=${2:-$1}
	shift $(($# < 2 ? $# : 2))
	# shellcheck disable=SC2046
	clang -g -O1 -std=gnu11 -D_GNU_SOURCE -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Wno-ignored-attributes -no-pie "$@" \
		-I"/usr/include/postgresql/$PG_MAJOR/server" -Isrc -Itest/fuzz -Wl,--unresolved-symbols=ignore-all \
		-o "$work/$name" "test/fuzz/$target.c" test/fuzz/server.c $(fuzzed_sources "$target") -lcrypto || die "test/fuzz/$target.c does not build"
}

golden_bytes() {
	sed -n "s/.*\"$1\": \"\([0-9a-f]*\)\".*/\1/p" test/golden/vault.json | perl -ne 'chomp; print pack "H*", $_'
}

# seed_target TARGET DIRECTORY: valid inputs to begin from.
seed_target() {
	mkdir -p "$2"
	case $1 in
		record | wrap) golden_bytes "$1" > "$2/golden" ;;
		env_file)
			printf '\x14sk-live-0123456789ab# comment\nexport A="x\\n y" # z\r\nOPENAI_API_KEY='"'"'q'"'"'\n\na.b-c: `1\n2`\nexport=3\nA=4' > "$2/all"
			printf '\xef\xbb\xbfA=1\nA=2\n' > "$2/mark"
			printf '\nA\nA=2\n=3\n' > "$2/rejoined"
			;;
		master_key)
			printf '%064d\n' 1 > "$2/one"
			printf '%064d\r\n\t%064d ' 1 2 > "$2/two"
			yes "$(printf '%064x' 255)" | head -n 17 > "$2/many"
			;;
		reference) printf 'vault:secret/users/a.b/openai#api_key' > "$2/one" ;;
		secret_text)
			printf '\x08abcdefghSELECT keyvault.store_api_key('"'openai', 'sk-proj-abcdefgh0123456789'"')' > "$2/store"
			printf '\x03keyEXECUTE /* a /* b */ */ "p" -- c\n(1); CREATE TRIGGER t EXECUTE FUNCTION f(); SELECT api_key_id, "request" ( 1 )' > "$2/execute"
			;;
	esac
}

# fuzz_target TARGET CORPUS SECONDS: run it; it ends well if its status says so.
fuzz_target() {
	local target=$1 corpus=$2 seconds=$3
	KV_FUZZ_RECORD="$corpus/golden" KV_FUZZ_WRAP="$corpus/golden" KV_FUZZ_BOX="$corpus/valid" \
		"$work/$target" -max_total_time="$seconds" -max_len=4096 -timeout=10 -rss_limit_mb=2048 -dict=test/fuzz/dictionary -print_final_stats=1 \
		-artifact_prefix="$work/crash-$target-" "$corpus" > "$work/$target.log" 2>&1
	echo $? > "$work/$target.status"
}

report_target() {
	local target=$1 runs
	if [ "$(cat "$work/$target.status")" = 0 ]; then
		runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/$target.log")
		printf '%s: %s executions, %s' "$target" "$runs" "$(sed -n 's/.*\(cov: [0-9]*\).*\(corp: [0-9]*\).*/\1, \2/p' "$work/$target.log" | tail -n 1)"
		sed -n 's/^[0-9]* changed bytes refused$/, &/p' "$work/$target.log" | tr -d '\n'
		echo
		count "$target" 1 0
	else
		grep -aE 'does not hold|ERROR|SUMMARY|runtime error|Test unit' "$work/$target.log" | head -n 20
		count "$target" 0 1
	fi
}

# finds_planted CORPUS: a defect that is planted in a copy of a parser is found, or the fuzzer would prove nothing.
finds_planted() {
	local corpus=$1
	cp -r src "$work/src"
	sed -i '/escaped && \*p == /s/ && p + 1 < end//' "$work/src/vault/env_file.c"
	cmp -s src/vault/env_file.c "$work/src/vault/env_file.c" && die 'the defect could not be planted'
	(
		fuzzed_sources() { echo "$work/src/vault/env_file.c"; }
		build_target env_file planted
	)
	if "$work/planted" -runs=1000000 -max_len=4096 -dict=test/fuzz/dictionary -artifact_prefix="$work/" "$corpus" > "$work/planted.log" 2>&1; then
		count planted 0 1
	else
		grep -q 'heap-buffer-overflow' "$work/planted.log"
		count planted $((1 - $?)) $?
	fi
}
