/*-------------------------------------------------------------------------
 * dialect.c
 *		How a provider's answer states what it used.
 *
 * Sources: OpenAI API reference (chat completion object, response object, embeddings),
 * Anthropic API reference (Messages, usage), Gemini API reference (UsageMetadata), Exa
 * API reference (costDollars).
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "gateway/dialect.h"

#include "base/json_field.h"
#include "credit/debit.h"

#define INPUT	1
#define CACHED	2
#define OUTPUT	4
#define REASONING	8

/* A field counts towards each of its kinds, unless an earlier one of its group was there. */
typedef struct TokenField
{
	const char *path;
	int			kinds;
	int			group;
} TokenField;

typedef struct Dialect
{
	const char *name;
	const char *model;
	const char *cost_usd;
	TokenField	fields[10];
} Dialect;

static const Dialect dialects[] = {
	{"openai", "model", NULL, {
			{"usage.prompt_tokens", INPUT, 1},
			{"usage.input_tokens", INPUT, 1},
			{"usage.prompt_tokens_details.cached_tokens", CACHED, 2},
			{"usage.input_tokens_details.cached_tokens", CACHED, 2},
			{"usage.prompt_cache_hit_tokens", CACHED, 2},
			{"usage.completion_tokens", OUTPUT, 3},
			{"usage.output_tokens", OUTPUT, 3},
			{"usage.completion_tokens_details.reasoning_tokens", REASONING, 4},
			{"usage.output_tokens_details.reasoning_tokens", REASONING, 4},
	}},
	{"anthropic", "model", NULL, {
			{"usage.input_tokens", INPUT, 1},
			{"usage.cache_creation_input_tokens", INPUT, 2},
			{"usage.cache_read_input_tokens", INPUT | CACHED, 3},
			{"usage.output_tokens", OUTPUT, 4},
	}},
	{"gemini", "modelVersion", NULL, {
			{"usageMetadata.promptTokenCount", INPUT, 1},
			{"usageMetadata.toolUsePromptTokenCount", INPUT, 2},
			{"usageMetadata.cachedContentTokenCount", CACHED, 3},
			{"usageMetadata.candidatesTokenCount", OUTPUT, 4},
			{"usageMetadata.thoughtsTokenCount", OUTPUT | REASONING, 5},
	}},
	{"json", "model", "costDollars.total", {{NULL}}},
};

/* Read what an answer says it used. Fields that are missing or absurd leave zero, and stated false. */
void
kv_dialect_read_usage(const char *dialect, Jsonb *answer, KvUsage *usage)
{
	memset(usage, 0, sizeof(*usage));
	for (size_t i = 0; i < lengthof(dialects); i++)
	{
		const Dialect *d = &dialects[i];
		int			last_group = 0;

		if (strcmp(d->name, dialect) != 0)
			continue;
		for (const TokenField *field = d->fields; field->path; field++)
		{
			int64		count;

			if (field->group == last_group || !kv_json_count(answer, field->path, &count))
				continue;
			last_group = field->group;
			if (field->kinds & INPUT)
				usage->input_tokens += count;
			if (field->kinds & CACHED)
				usage->cached_tokens += count;
			if (field->kinds & OUTPUT)
				usage->output_tokens += count;
			if (field->kinds & REASONING)
				usage->reasoning_tokens += count;
			usage->stated = usage->stated || (field->kinds & (INPUT | OUTPUT)) != 0;
		}
		usage->cached_tokens = Min(usage->cached_tokens, usage->input_tokens);
		usage->reasoning_tokens = Min(usage->reasoning_tokens, usage->output_tokens);
		usage->model = kv_json_string(answer, d->model);
		/* What is no model's name is none. */
		if (usage->model && strlen(usage->model) > KV_USAGE_NAME_MAX)
			usage->model = NULL;
		if (d->cost_usd)
			(void) kv_json_amount(answer, d->cost_usd, &usage->stated_usd);
	}
}

/* Does the answer say that the key is not valid? */
bool
kv_dialect_key_refused(const char *dialect, long status_code, Jsonb *answer)
{
	char	   *message;

	if (status_code == 401)
		return true;
	/* Google answers a bad key with 400, INVALID_ARGUMENT and these words. */
	if (strcmp(dialect, "gemini") != 0 || status_code != 400 || answer == NULL)
		return false;
	message = kv_json_string(answer, "error.message");
	return message && strstr(message, "API key not valid") != NULL;
}
