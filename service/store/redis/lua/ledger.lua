-- Read or change the account of one tenant: the bytes of its sessions, and the tokens that it may learn now.
--
-- KEYS  a hash of session id -> bytes, or `new <ms>` (the time of a reservation); `*` -> the sum of the bytes;
--       `*settled` -> 1 once the account was compared with all stored sessions;
--       a hash of the tokens `left` at the time `at` (ms): a bucket that holds `rate` tokens, fills in a minute and may
--       be overdrawn.
-- ARGV  an action and its arguments:
--       place id limit           reserve room for a new session; returns {1 if granted, number of sessions before}
--       hold id bytes rate used  set a session's bytes ('' = leave them), and take `used` tokens from the bucket
--       drop age id ...          remove sessions, but no reservation younger than `age` (ms)
--       state id bytes ...       set the bytes of several sessions
--       settled                  note that the account was compared with all stored sessions
--       look rate                returns {bytes of all sessions, tokens left}
local sessions, tokens = KEYS[1], KEYS[2]
local act, id = ARGV[1], ARGV[2]
local MINUTE = 60000

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- Return a number as text without a fraction.
local function whole(number)
  return string.format('%.0f', number)
end

local function number(key, field, default)
  return tonumber(redis.call('HGET', key, field) or '') or default
end

-- Change the sum of the bytes.
local function add(change)
  redis.call('HINCRBY', sessions, '*', whole(change))
end

local function set_bytes(id, bytes)
  add(bytes - number(sessions, id, 0))
  redis.call('HSET', sessions, id, whole(bytes))
end

-- Return the tokens in the bucket now.
local function bucket(rate)
  local elapsed = math.max(0, now - number(tokens, 'at', now))
  return math.min(rate, number(tokens, 'left', rate) + elapsed * rate / MINUTE)
end

if act == 'place' then
  local limit = tonumber(ARGV[3])
  local count = redis.call('HLEN', sessions) - redis.call('HEXISTS', sessions, '*')
    - redis.call('HEXISTS', sessions, '*settled')
  local exists = redis.call('HEXISTS', sessions, id) == 1
  if limit > 0 and count >= limit and not exists then
    return {0, count}
  end
  if not exists then
    redis.call('HSET', sessions, id, 'new ' .. whole(now))
  end
  return {1, count}
elseif act == 'hold' then
  local bytes, rate, used = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
  if bytes then
    set_bytes(id, bytes)
  end
  if rate > 0 then
    local left = bucket(rate) - used
    redis.call('HSET', tokens, 'left', string.format('%.3f', left), 'at', whole(now))
    redis.call('PEXPIRE', tokens, whole((rate - left) * MINUTE / rate + 1000)) -- the bucket is full again by then
  end
elseif act == 'drop' then
  for i = 3, #ARGV do
    local reserved_at = tonumber(string.match(redis.call('HGET', sessions, ARGV[i]) or '', '^new (%d+)$'))
    if not reserved_at or now - reserved_at >= tonumber(ARGV[2]) then
      add(0 - number(sessions, ARGV[i], 0)) -- 0 - 0 is 0; unary minus would give -0, which is no integer
      redis.call('HDEL', sessions, ARGV[i])
    end
  end
elseif act == 'state' then
  for i = 2, #ARGV, 2 do
    set_bytes(ARGV[i], tonumber(ARGV[i + 1]))
  end
elseif act == 'settled' then
  redis.call('HSET', sessions, '*settled', 1)
elseif act == 'look' then
  local rate = tonumber(ARGV[2])
  return {number(sessions, '*', 0), whole(rate > 0 and math.floor(bucket(rate)) or 0)}
end
