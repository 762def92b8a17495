/*-------------------------------------------------------------------------
 * plan_text.h
 *		Keeps secrets out of the names of memory contexts.
 *-------------------------------------------------------------------------
 */
#ifndef KV_PLAN_TEXT_H
#define KV_PLAN_TEXT_H

#include "nodes/plannodes.h"

extern bool kv_plan_text_withhold(bool (*shows_secret) (const char *text));
extern void kv_plan_text_withhold_of(PlannedStmt *statement, bool (*shows_secret) (const char *text));

#endif
