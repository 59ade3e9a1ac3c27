-- KEYS: requests, tokens, running. ARGV: now or '', limits of requests, tokens, concurrency
-- (-1: none), lease, lease time in ms. Answers {kind of refusal or 0, current, wait in ms, requests
-- used, tokens used}. All is checked before anything is counted.
local now = now_ms(ARGV[1])
local request_limit, token_limit, slots = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local requests = request_limit < 0 and 0 or used(KEYS[1], now)
local tokens = token_limit < 0 and 0 or used(KEYS[2], now)
if request_limit >= 0 and requests >= request_limit then
  return {1, requests + 1, wait_ms(KEYS[1], now, requests + 1 - request_limit), requests, tokens}
end
if token_limit >= 0 and tokens >= token_limit then
  return {2, tokens + 1, wait_ms(KEYS[2], now, tokens + 1 - token_limit), requests, tokens}
end
if slots >= 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
  local running = redis.call('ZCARD', KEYS[3])
  if running >= slots then return {3, running + 1, 0, requests, tokens} end
  redis.call('ZADD', KEYS[3], now + ARGV[6], ARGV[5])
  redis.call('PEXPIRE', KEYS[3], ARGV[6])
end
if request_limit >= 0 then
  add(KEYS[1], now, 1)
  requests = requests + 1
end
return {0, 0, 0, requests, tokens}
