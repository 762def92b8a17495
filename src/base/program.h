/*-------------------------------------------------------------------------
 * program.h
 *		Run a program and take what it prints.
 *-------------------------------------------------------------------------
 */
#ifndef KV_PROGRAM_H
#define KV_PROGRAM_H

#include "postgres.h"

extern char *kv_program_run(char *const *arguments, Size size_max, int timeout_ms, const char **reason);

#endif
