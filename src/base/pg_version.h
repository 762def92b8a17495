/*-------------------------------------------------------------------------
 * pg_version.h
 *		The differences between PostgreSQL 15 and 18, all in one place.
 *-------------------------------------------------------------------------
 */
#ifndef KV_PG_VERSION_H
#define KV_PG_VERSION_H

#include "storage/proc.h"
#if PG_VERSION_NUM >= 160000
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

#endif
