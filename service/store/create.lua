-- Creates a session unless there is one.
--
-- KEYS  the meta hash.  ARGV  field, value, ...
-- Returns the meta that is stored now, as field, value, ...
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('HSET', KEYS[1], unpack(ARGV))
end
return redis.call('HGETALL', KEYS[1])
