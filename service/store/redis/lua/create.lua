-- Create a session unless there is one.
--
-- KEYS  the meta hash.  ARGV  lease or '', default ttl, then field, value, ...
-- Returns {'done', '', the meta hash that is stored now, as field, value, ...}, {verdict, detail} of `fenced`,
--         or {'damaged', what is missing}.
local stale = fenced(ARGV[1])
if stale then
  return stale
end
if redis.call('EXISTS', KEYS[1]) == 0 then
  local damage = missing()
  if damage then
    return {'damaged', damage}
  end
  redis.call('HSET', KEYS[1], 'format', FORMAT, unpack(ARGV, 3))
  age(ARGV[2])
end
return {'done', '', unpack(redis.call('HGETALL', KEYS[1]))}
