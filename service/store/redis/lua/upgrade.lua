-- Rewrite a session of an older format in the present one.
--
-- KEYS  the meta hash.  ARGV  default ttl.
local format = redis.call('HGET', KEYS[1], 'format')
if OLD_FORMATS[format] then
  upgrade(format)
  age(ARGV[1])
end
