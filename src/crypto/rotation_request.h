/*-------------------------------------------------------------------------
 * rotation_request.h
 *		Rotations that are left to the worker.
 *-------------------------------------------------------------------------
 */
#ifndef KV_ROTATION_REQUEST_H
#define KV_ROTATION_REQUEST_H

extern bool kv_rotation_request_make(const char *what, const char *user_id, int batch);
extern void kv_rotation_request_announce(void);

#endif
