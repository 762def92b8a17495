# Cryptography against published vectors, and a golden key for one call, in a program of its own. Sourced by script/test.
run_vectors() {
	local log=$work/vectors.log
	# What call_key.c has beyond opening is left unresolved, and never called.
	clang -g -O1 -std=gnu11 -D_GNU_SOURCE -fsanitize=address,undefined -fno-sanitize-recover=all -Wall -Wno-ignored-attributes -no-pie \
		-I"/usr/include/postgresql/$PG_MAJOR/server" -Isrc -Itest/fuzz -Wl,--unresolved-symbols=ignore-all -o "$work/vectors" \
		test/fuzz/vectors.c test/fuzz/server.c src/vault/call_key.c src/crypto/{aead,associated_data,openssl_error,sealed_box}.c src/base/secret.c \
		-lcrypto || die 'test/fuzz/vectors.c does not build'
	"$work/vectors" "$(sed -n 's/.*"call_key": "\([0-9a-f]*\)".*/\1/p' test/golden/formats.json)" > "$log" 2>&1 || grep -E '^not ok|ERROR|runtime error' "$log"
	local bad
	bad=$(matches '^not ok ' "$log")
	# A run that stopped has no plan.
	grep -q '^1\.\.' "$log" || bad=$((bad + 1))
	count vectors "$(matches '^ok ' "$log")" "$bad"
}
