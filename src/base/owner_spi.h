/*-------------------------------------------------------------------------
 * owner_spi.h
 *		SQL statements run as the extension's owner.
 *-------------------------------------------------------------------------
 */
#ifndef KV_OWNER_SPI_H
#define KV_OWNER_SPI_H

#include "postgres.h"

#include "executor/spi.h"

#define KV_STATEMENT_MAX_ARGS 16

/* A statement that is planned once per process. Declare it static, with plan NULL. */
typedef struct KvStatement
{
	const char *sql;
	int			nargs;
	Oid			argtypes[KV_STATEMENT_MAX_ARGS];
	SPIPlanPtr	plan;
} KvStatement;

typedef struct KvOwnerScope
{
	Oid			caller;
	int			security_context;
	int			guc_level;		/* 0: search_path was left alone */
} KvOwnerScope;

extern void kv_owner_begin(KvOwnerScope *scope);
extern void kv_owner_begin_qualified(KvOwnerScope *scope);
extern void kv_owner_end(KvOwnerScope *scope);
extern void kv_owner_fresh_snapshot_begin(void);
extern void kv_owner_fresh_snapshot_end(void);
extern uint64 kv_statement_execute(KvStatement *statement, const Datum *values, const char *nulls);
extern uint64 kv_statement_read(KvStatement *statement, const Datum *values, Snapshot snapshot);
extern Datum kv_statement_value(KvStatement *statement, const Datum *values, const char *nulls, bool *isnull);

#endif
