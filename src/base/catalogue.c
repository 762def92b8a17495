/*-------------------------------------------------------------------------
 * catalogue.c
 *		Relations and functions of the schema keyvault, by name.
 *
 * An oid that was found is used again until this process hears that a relation or a schema
 * changed, which may be any: then it is looked up again.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/catalogue.h"

#include "base/error.h"
#include "catalog/namespace.h"
#include "nodes/makefuncs.h"
#include "nodes/value.h"
#include "parser/parse_func.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/syscache.h"

/* Changes heard of; from 1, as a KvRelation begins with 0. */
static uint64 changes = 1;

static void
relation_changed(Datum arg, Oid relation)
{
	changes++;
}

static void
schema_changed(Datum arg, int cache, uint32 hash)
{
	changes++;
}

/* Follow changes of the catalogue; called once, while the server preloads the library. */
void
kv_catalogue_init(void)
{
	CacheRegisterRelcacheCallback(relation_changed, (Datum) 0);
	CacheRegisterSyscacheCallback(NAMESPACEOID, schema_changed, (Datum) 0);
}

/* A number that differs from an earlier one if relations or schemas may have changed since; never 0. */
uint64
kv_catalogue_changes(void)
{
	return changes;
}

/* The oid of a relation; InvalidOid when there is none of that name. */
Oid
kv_relation_find(KvRelation *relation)
{
	uint64		now = changes;
	Oid			schema;

	if (relation->known_at == now)
		return relation->oid;
	schema = get_namespace_oid("keyvault", true);
	relation->oid = OidIsValid(schema) ? get_relname_relid(relation->name, schema) : InvalidOid;
	relation->known_at = now;
	return relation->oid;
}

/* The oid of a relation. Error: 55000 when there is none of that name. */
Oid
kv_relation_oid(KvRelation *relation)
{
	if (!OidIsValid(kv_relation_find(relation)))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("keyvault.%s does not exist", relation->name),
				 errhint("Run CREATE EXTENSION keyvault CASCADE.")));
	return relation->oid;
}

/* Whether the SQL that is installed, which may be of an earlier version than the library, has a function. */
bool
kv_function_exists(const char *name, int nargs, const Oid *argtypes)
{
	List	   *qualified = list_make2(makeString("keyvault"), makeString(pstrdup(name)));

	return OidIsValid(LookupFuncName(qualified, nargs, argtypes, true));
}
