-- Replaces the options of a session, if there is one of this format.
--
-- KEYS  the meta hash.  ARGV  format, options.
-- Returns the meta that is stored now, as field, value, ...; nothing if there is no session.
if redis.call('HGET', KEYS[1], 'format') == ARGV[1] then
  redis.call('HSET', KEYS[1], 'options', ARGV[2])
end
return redis.call('HGETALL', KEYS[1])
