/*-------------------------------------------------------------------------
 * pg_version.h
 *		The differences between PostgreSQL 15 and 18: no other file asks for the version.
 *-------------------------------------------------------------------------
 */
#ifndef KV_PG_VERSION_H
#define KV_PG_VERSION_H

#include "access/genam.h"
#include "storage/proc.h"
#if PG_VERSION_NUM >= 160000
#include "nodes/miscnodes.h"
#include "varatt.h"
#endif

#if PG_VERSION_NUM < 150000
#error "keyvault needs PostgreSQL 15 or later"
#endif

/* The number of our own PGPROC, by which another process finds our latch. */
#if PG_VERSION_NUM >= 170000
#define KvMyProcNumber() ((int) MyProcNumber)
#else
#define KvMyProcNumber() (MyProc->pgprocno)
#endif

/* 17 gave ResourceOwner-less wait event sets a new first argument. */
#if PG_VERSION_NUM >= 170000
#define KvCreateWaitEventSet(nevents) CreateWaitEventSet(NULL, nevents)
#else
#define KvCreateWaitEventSet(nevents) CreateWaitEventSet(TopMemoryContext, nevents)
#endif

/* 18 counts searches of an index where it is asked to. */
#if PG_VERSION_NUM >= 180000
#define KvIndexBeginScan(table, index, snapshot, nkeys) index_beginscan(table, index, snapshot, NULL, nkeys, 0)
#else
#define KvIndexBeginScan(table, index, snapshot, nkeys) index_beginscan(table, index, snapshot, nkeys, 0)
#endif

/* From 16 on what a JSON parser calls can stop it; 17 can fill in a context of the caller's. */
#if PG_VERSION_NUM >= 160000
#define KvJsonActionResult JsonParseErrorType
#define KV_JSON_ACTION_DONE JSON_SUCCESS
#else
#define KvJsonActionResult void
#define KV_JSON_ACTION_DONE
#endif
#if PG_VERSION_NUM >= 170000
#define KvMakeJsonLexContext(text, length, encoding) makeJsonLexContextCstringLen(NULL, text, length, encoding, true)
#else
#define KvMakeJsonLexContext(text, length, encoding) makeJsonLexContextCstringLen((char *) (text), length, encoding, true)
#endif

/* 18 makes UUIDs of version 7 itself. */
#define KV_HAS_UUIDV7 (PG_VERSION_NUM >= 180000)

/* 18 dropped the executor's execute_once. */
#if PG_VERSION_NUM >= 180000
#define KV_EXECUTOR_RUN_PARAMETERS QueryDesc *query, ScanDirection direction, uint64 count
#define KV_EXECUTOR_RUN_ARGUMENTS query, direction, count
#else
#define KV_EXECUTOR_RUN_PARAMETERS QueryDesc *query, ScanDirection direction, uint64 count, bool execute_once
#define KV_EXECUTOR_RUN_ARGUMENTS query, direction, count, execute_once
#endif

/* 16 says which indexes an update has to enter: all, or those that summarize. */
#if PG_VERSION_NUM >= 160000
#define KvUpdateIndexes TU_UpdateIndexes
#define KvMustUpdateIndexes(update_indexes) ((update_indexes) != TU_None)
#define KvExecInsertIndexTuples(relation, row, estate, update_indexes) \
	ExecInsertIndexTuples(relation, row, estate, true, false, NULL, NIL, (update_indexes) == TU_Summarizing)
#else
#define KvUpdateIndexes bool
#define KvMustUpdateIndexes(update_indexes) (update_indexes)
#define KvExecInsertIndexTuples(relation, row, estate, update_indexes) \
	ExecInsertIndexTuples(relation, row, estate, true, false, NULL, NIL)
#endif

#endif
