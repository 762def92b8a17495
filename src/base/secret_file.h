/*-------------------------------------------------------------------------
 * secret_file.h
 *		Small files with secrets, which nobody else may read.
 *-------------------------------------------------------------------------
 */
#ifndef KV_SECRET_FILE_H
#define KV_SECRET_FILE_H

#include "postgres.h"

extern char *kv_secret_file_read(const char *path, Size size_max, const char **reason);
extern const char *kv_secret_file_misplaced(const char *path);

#endif
