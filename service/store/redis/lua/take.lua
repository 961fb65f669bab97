-- Take a key that nobody has. A full server gives it too: archiving makes room.
--
-- KEYS  the key.  ARGV  its value, its duration in ms or '' for ever.
-- Returns 1 if the key had no value, else 0.
if redis.call('EXISTS', KEYS[1]) == 1 then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1])
if ARGV[2] ~= '' then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return 1
