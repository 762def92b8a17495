/*-------------------------------------------------------------------------
 * catalogue.h
 *		Relations and functions of the schema keyvault, by name.
 *-------------------------------------------------------------------------
 */
#ifndef KV_CATALOGUE_H
#define KV_CATALOGUE_H

#include "postgres.h"

/* A table or index. Declare it static, with its name alone. */
typedef struct KvRelation
{
	const char *name;
	Oid			oid;
	uint64		known_at;		/* oid holds until the catalogue changes */
} KvRelation;

extern void kv_catalogue_init(void);
extern uint64 kv_catalogue_changes(void);
extern Oid	kv_relation_find(KvRelation *relation);
extern Oid	kv_relation_oid(KvRelation *relation);
extern bool kv_function_exists(const char *name, int nargs, const Oid *argtypes);

#endif
