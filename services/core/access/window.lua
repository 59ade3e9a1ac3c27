-- Sliding windows shared by the scripts of this folder; put before each of them.
-- A window is a list of slots, oldest first, each "slot:before:after": the running total before
-- and after the uses of that tenth of a second. Used = last after - first before.

local WINDOW_MS, SLOT_MS = 60000, 100
local SLOTS = WINDOW_MS / SLOT_MS

local function now_ms(given)
  if given ~= '' then return tonumber(given) end
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function parse(entry)
  local slot, before, after = string.match(entry, '(%d+):(%d+):(%d+)')
  return tonumber(slot), tonumber(before), tonumber(after)
end

local function used(key, now)
  local current = math.floor(now / SLOT_MS)
  local oldest = current - SLOTS
  -- Slots that lie ahead are from before the clock was set back: nobody would ever see them pass.
  local tail = redis.call('LINDEX', key, -1)
  while tail and parse(tail) > current + 1 do
    redis.call('RPOP', key)
    tail = redis.call('LINDEX', key, -1)
  end
  local head = redis.call('LINDEX', key, 0)
  while head do
    local slot, before = parse(head)
    if slot >= oldest then
      local _, _, after = parse(redis.call('LINDEX', key, -1))
      return after - before
    end
    redis.call('LPOP', key)
    head = redis.call('LINDEX', key, 0)
  end
  return 0
end

local function add(key, now, count)
  local current = math.floor(now / SLOT_MS)
  local before, total = 0, 0
  local tail = redis.call('LINDEX', key, -1)
  if tail then
    local slot
    slot, before, total = parse(tail)
    if slot >= current then
      redis.call('LSET', key, -1, string.format('%d:%d:%d', slot, before, total + count))
      return
    end
  end
  redis.call('RPUSH', key, string.format('%d:%d:%d', current, total, total + count))
  redis.call('PEXPIRE', key, WINDOW_MS + SLOT_MS)
end

local function wait_ms(key, now, excess)
  local first
  for _, entry in ipairs(redis.call('LRANGE', key, 0, -1)) do
    local slot, before, after = parse(entry)
    first = first or before
    if after - first >= excess then return (slot + SLOTS + 1) * SLOT_MS - now end
  end
  return WINDOW_MS
end
