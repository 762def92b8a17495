/*-------------------------------------------------------------------------
 * error.h
 *		The SQLSTATEs of keyvault, and the mark by which its messages are known.
 *
 * A message raised under this text domain never quotes a secret: the log's redaction
 * trusts it.
 *-------------------------------------------------------------------------
 */
#ifndef KV_ERROR_H
#define KV_ERROR_H

#include "postgres.h"

#undef TEXTDOMAIN
#define TEXTDOMAIN "keyvault"

#define ERRCODE_KV_NO_API_KEY			MAKE_SQLSTATE('K','V','0','0','3')
#define ERRCODE_KV_MASTER_KEY			MAKE_SQLSTATE('K','V','0','0','4')
#define ERRCODE_KV_SECRET_UNREADABLE	MAKE_SQLSTATE('K','V','0','0','5')
#define ERRCODE_KV_USER_INACTIVE		MAKE_SQLSTATE('K','V','0','0','7')
#define ERRCODE_KV_CALL_FAILED			MAKE_SQLSTATE('K','V','0','0','8')
#define ERRCODE_KV_KEY_MALFORMED		MAKE_SQLSTATE('K','V','0','0','9')

#endif
