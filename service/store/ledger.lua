-- One tenant's account: what its sessions hold, and how many tokens it may learn now.
--
-- KEYS  a hash of session id -> bytes, `*` -> the sum of them; a hash of the tokens `left` at the time `at` (ms),
--       a bucket that holds `rate` tokens, fills in a minute and may be overdrawn.
-- ARGV  what to do, then
--       place id limit           a new session's place: {1 if there is one, sessions before}
--       hold id bytes rate used  notes a session's bytes ('' = do not), and takes `used` from the bucket
--       drop id                  forgets a session
--       names                    {id, ...}
--       look rate                {bytes held, tokens left}
local sessions, tokens = KEYS[1], KEYS[2]
local act, id = ARGV[1], ARGV[2]
local MINUTE = 60000

local function number(key, field, default)
  return tonumber(redis.call('HGET', key, field) or default)
end

local function note(bytes)
  redis.call('HINCRBY', sessions, '*', string.format('%.0f', bytes - number(sessions, id, 0)))
  redis.call('HSET', sessions, id, string.format('%.0f', bytes))
end

local function bucket(rate)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local since = math.max(0, now - number(tokens, 'at', now))
  return math.min(rate, number(tokens, 'left', rate) + since * rate / MINUTE), now
end

if act == 'place' then
  local count = redis.call('HLEN', sessions) - redis.call('HEXISTS', sessions, '*')
  if redis.call('HEXISTS', sessions, id) == 1 then
    return {1, count}
  end
  local limit = tonumber(ARGV[3])
  if limit > 0 and count >= limit then
    return {0, count}
  end
  note(0)
  return {1, count}
elseif act == 'hold' then
  local bytes, rate, used = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
  if bytes then
    note(bytes)
  end
  if rate > 0 then
    local left, now = bucket(rate)
    left = left - used
    redis.call('HSET', tokens, 'left', string.format('%.3f', left), 'at', string.format('%.0f', now))
    redis.call('PEXPIRE', tokens, string.format('%.0f', (rate - left) * MINUTE / rate + 1000)) -- full again by then
  end
elseif act == 'drop' then
  redis.call('HINCRBY', sessions, '*', string.format('%.0f', 0 - number(sessions, id, 0)))
  redis.call('HDEL', sessions, id)
elseif act == 'names' then
  return redis.call('HKEYS', sessions)
elseif act == 'look' then
  local rate = tonumber(ARGV[2])
  local left = rate > 0 and bucket(rate) or 0
  return {number(sessions, '*', 0), string.format('%.0f', math.floor(left))}
end
