-- KEYS: running. ARGV: now or '', lease time in ms, leases. Puts the expiry of leases that still exist off.
local expiry = now_ms(ARGV[1]) + ARGV[2]
for i = 3, #ARGV do redis.call('ZADD', KEYS[1], 'XX', expiry, ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
