-- Replace the options of a session, if there is one and this release knows its format. No recorded answer and no kept
-- response outlives the session's new time to live.
--
-- KEYS  the meta hash.  ARGV  options, default ttl.
-- Returns the meta hash that is stored now, as field, value, ...; nothing if there is no session.
local format = redis.call('HGET', KEYS[1], 'format')
if format and known(format) then
  redis.call('HSET', KEYS[1], 'options', ARGV[1])
  local now, life = tonumber(redis.call('TIME')[1]), lifetime(ARGV[2])
  local ends = now + life
  if life > 0 and tonumber(redis.call('HGET', KEYS[1], 'once_until') or 0) > ends then
    redis.call('HSET', KEYS[1], 'once_until', ends)
    for _, once in ipairs(redis.call('ZRANGE', ONCES, 0, -1)) do
      if tonumber(redis.call('ZSCORE', ONCES, once)) > ends then
        redis.call('EXPIRE', HOME .. 'once:' .. once, life)
        redis.call('ZADD', ONCES, ends, once)
      end
    end
  end
  for _, name in ipairs(life > 0 and redis.call('ZRANGE', RESPONSES, 0, -1) or {}) do
    if redis.call('TTL', HOME .. 'response:' .. name) > life then
      redis.call('EXPIRE', HOME .. 'response:' .. name, life)
    end
  end
  age(ARGV[2])
end
return redis.call('HGETALL', KEYS[1])
