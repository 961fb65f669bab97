-- One tenant's account: what its sessions hold, and how many tokens it may learn now.
--
-- KEYS  a hash of session id -> bytes, or `new <ms>` since then while it has not learned; `*` -> the sum of the bytes;
--       a hash of the tokens `left` at the time `at` (ms): a bucket that holds `rate` tokens, fills in a minute and may
--       be overdrawn.
-- ARGV  what to do, then
--       place id limit           a new session's place: {1 if there is one, sessions before}
--       hold id bytes rate used  notes a session's bytes ('' = do not), and takes `used` from the bucket
--       drop id age              forgets a session, unless it is new and younger than that (ms)
--       state id bytes ...       notes the bytes of several
--       names                    {id, ...}
--       look rate                {bytes held, tokens left}
local sessions, tokens = KEYS[1], KEYS[2]
local act, id = ARGV[1], ARGV[2]
local MINUTE = 60000

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function whole(number)
  return string.format('%.0f', number)
end

local function number(key, field, default)
  return tonumber(redis.call('HGET', key, field) or '') or default
end

local function add(change)
  redis.call('HINCRBY', sessions, '*', whole(change))
end

local function note(id, bytes)
  add(bytes - number(sessions, id, 0))
  redis.call('HSET', sessions, id, whole(bytes))
end

local function bucket(rate)
  local since = math.max(0, now - number(tokens, 'at', now))
  return math.min(rate, number(tokens, 'left', rate) + since * rate / MINUTE)
end

if act == 'place' then
  local limit = tonumber(ARGV[3])
  local count = redis.call('HLEN', sessions) - redis.call('HEXISTS', sessions, '*')
  local there = redis.call('HEXISTS', sessions, id) == 1
  if limit > 0 and count >= limit and not there then
    return {0, count}
  end
  if not there then
    redis.call('HSET', sessions, id, 'new ' .. whole(now))
  end
  return {1, count}
elseif act == 'hold' then
  local bytes, rate, used = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
  if bytes then
    note(id, bytes)
  end
  if rate > 0 then
    local left = bucket(rate) - used
    redis.call('HSET', tokens, 'left', string.format('%.3f', left), 'at', whole(now))
    redis.call('PEXPIRE', tokens, whole((rate - left) * MINUTE / rate + 1000)) -- full again by then
  end
elseif act == 'drop' then
  local since = tonumber(string.match(redis.call('HGET', sessions, id) or '', '^new (%d+)$'))
  if not since or now - since >= tonumber(ARGV[3]) then
    add(0 - number(sessions, id, 0)) -- not -0, which is no integer
    redis.call('HDEL', sessions, id)
  end
elseif act == 'state' then
  for i = 2, #ARGV, 2 do
    note(ARGV[i], tonumber(ARGV[i + 1]))
  end
elseif act == 'names' then
  return redis.call('HKEYS', sessions)
elseif act == 'look' then
  local rate = tonumber(ARGV[2])
  return {number(sessions, '*', 0), whole(rate > 0 and math.floor(bucket(rate)) or 0)}
end
