-- Replace the options of a session, if there is one and this release knows its format.
--
-- KEYS  the meta hash.  ARGV  options, default ttl.
-- Returns the meta hash that is stored now, as field, value, ...; nothing if there is no session.
local format = redis.call('HGET', KEYS[1], 'format')
if format and known(format) then
  redis.call('HSET', KEYS[1], 'options', ARGV[1])
  age(ARGV[2])
end
return redis.call('HGETALL', KEYS[1])
