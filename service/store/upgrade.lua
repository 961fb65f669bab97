-- Takes a session over that an earlier release wrote.
--
-- KEYS  the meta hash.  ARGV  default ttl.
if OLD_FORMATS[redis.call('HGET', KEYS[1], 'format')] then
  upgrade()
  age(ARGV[1])
end
