/*-------------------------------------------------------------------------
 * openpgp.c
 *		OpenPGP messages, which pgcrypto makes.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/openpgp.h"

#include "base/error.h"
#include "base/owner_spi.h"
#include "base/subtransaction.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "utils/builtins.h"

/*
 * A function of pgcrypto's, in whatever schema it is. pgcrypto may have been made by someone who is no superuser, and
 * who can then make functions of his own its members: only a superuser makes one in C.
 */
static Oid
pgcrypto_function(const char *name, int n_arguments)
{
	static KvStatement find = {
		"SELECT p.oid FROM pg_proc p JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'"
		" JOIN pg_extension e ON e.oid = d.refobjid AND d.refclassid = 'pg_extension'::regclass"
		" JOIN pg_language l ON l.oid = p.prolang AND l.lanname = 'c'"
		" WHERE e.extname = 'pgcrypto' AND p.proname = $1 AND p.pronargs = $2", 2, {TEXTOID, INT4OID}
	};
	Datum		values[2] = {CStringGetTextDatum(name), Int32GetDatum(n_arguments)};
	bool		isnull;
	Datum		function = kv_statement_value(&find, values, NULL, &isnull);

	if (isnull)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_FUNCTION),
				 errmsg("pgcrypto has no function %s", name),
				 errhint("Run ALTER EXTENSION pgcrypto UPDATE.")));
	return DatumGetObjectId(function);
}

/* What is to be encrypted, to which armored key, and the outcome. */
typedef struct Encryption
{
	bytea	   *plain;
	Datum		public_key;
	bytea	   *bundle;
} Encryption;

static void
encrypt(void *arg)
{
	Encryption *this = arg;
	Datum		key = OidFunctionCall1(pgcrypto_function("dearmor", 1), this->public_key);

	this->bundle = DatumGetByteaP(OidFunctionCall3(pgcrypto_function("pgp_pub_encrypt_bytea", 3), PointerGetDatum(this->plain), key,
												   CStringGetTextDatum("cipher-algo=aes256, compress-algo=0")));
}

/*
 * Encrypt to an armored public key, in the memory of the caller. pgcrypto's own errors, which quote nothing, say what is
 * wrong with the key. Call between kv_owner_begin and kv_owner_end. Error: 39000.
 */
bytea *
kv_openpgp_encrypt(bytea *plain, Datum public_key)
{
	Encryption	this = {plain, public_key};
	ErrorData  *error = kv_subtransaction_run(encrypt, &this);

	if (error && error->sqlerrcode != ERRCODE_EXTERNAL_ROUTINE_INVOCATION_EXCEPTION)
		ReThrowError(error);
	if (error)
		ereport(ERROR,
				(errcode(error->sqlerrcode),
				 errmsg("nothing can be encrypted to this public key"),
				 errdetail("pgcrypto says: %s.", error->message),
				 errhint("Pass an armored OpenPGP public key that encrypts with RSA or ElGamal; pgcrypto has none on curves, such as ed25519 and cv25519.")));
	return this.bundle;
}
