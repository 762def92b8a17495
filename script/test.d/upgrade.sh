# What ALTER EXTENSION keyvault UPDATE makes of every released version. Sourced by script/test.
run_upgrade() {
	prepare
	cp sql/released/*.sql "$("$PG_BIN/pg_config" --sharedir)/extension"
	prove_files upgrade 'test/upgrade/*.pl' "$(nproc)"
}
