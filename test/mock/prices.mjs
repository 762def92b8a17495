// What @pydantic/genai-prices says uses cost, as an oracle for keyvault's prices.
// Reads an array of {provider, model, at, input, cached, output} from standard input; writes an array of USD, null for an unknown model.
// A use with a price of its own, {input, output, cached_input, reasoning, per_request, per_unit, tiers}, is worked out here instead.
import { calcPrice } from '@pydantic/genai-prices';

const names = { gemini: 'google', xai: 'x-ai' };

/* The highest tier whose bound the input exceeds takes the place of the prices that it has. */
function byPrice({ price, input, cached, output, reasoning, units }) {
  const tier = price.tiers.filter(({ over }) => input > over).at(-1) ?? {};
  const of = (kind) => tier[kind] ?? price[kind];
  const perToken = { input: of('input'), cached: of('cached_input') ?? of('input'), output: of('output'), reasoning: of('reasoning') ?? of('output') };
  const tokens = { input: input - cached, cached, output: output - reasoning, reasoning };
  const usd = Object.keys(tokens).reduce((sum, kind) => sum + tokens[kind] * Number(perToken[kind]) / 1e6, 0);
  return usd + Number(price.per_request) + Number(units ?? 0) * Number(price.per_unit);
}

let text = '';
for await (const chunk of process.stdin) text += chunk;
const costs = JSON.parse(text).map((use) => {
  if (use.price) return byPrice(use);
  const { provider, model, at, input, cached, output } = use;
  const price = calcPrice({ input_tokens: input, cache_read_tokens: cached, output_tokens: output }, model,
    { providerId: names[provider] ?? provider, timestamp: new Date(at) });
  return price === null ? null : price.total_price;
});
process.stdout.write(JSON.stringify(costs));
