-- KEYS: a window. ARGV: now or '', limit, count. Answers {1 when refused or 0, current, wait in ms, used}.
local now, limit, count = now_ms(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local sum = used(KEYS[1], now)
local excess = sum + count - limit
if excess > 0 then return {1, sum + count, wait_ms(KEYS[1], now, excess), sum} end
add(KEYS[1], now, count)
return {0, 0, 0, sum + count}
