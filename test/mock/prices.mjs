// What @pydantic/genai-prices says uses cost, as an oracle for keyvault's prices.
// Reads an array of {provider, model, at, input, cached, output} from standard input; writes an array of USD, null for an unknown model.
import { calcPrice } from '@pydantic/genai-prices';

const names = { gemini: 'google', xai: 'x-ai' };

let text = '';
for await (const chunk of process.stdin) text += chunk;
const costs = JSON.parse(text).map(({ provider, model, at, input, cached, output }) => {
  const price = calcPrice({ input_tokens: input, cache_read_tokens: cached, output_tokens: output }, model,
    { providerId: names[provider] ?? provider, timestamp: new Date(at) });
  return price === null ? null : price.total_price;
});
process.stdout.write(JSON.stringify(costs));
