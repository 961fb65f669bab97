-- Keep, return or erase a response that clients may continue.
--
-- KEYS  the meta hash of the response's session; of a response of no session, the name that such a hash would have.
-- ARGV  'put', name, record, its ttl, responses to keep, default ttl of sessions, `created` of the session or '',
--       'get', name or '' for the newest response, or
--       'delete', name.
-- Returns of 'put' whether the response is kept, of 'get' the record or nil, of 'delete' whether there was a response.
local verb, name, record, ttl, keep, default, created = unpack(ARGV)
if verb == 'get' then
  name = name ~= '' and name or redis.call('ZRANGE', RESPONSES, -1, -1)[1]
  return name and redis.call('GET', HOME .. 'response:' .. name)
end
if verb == 'delete' then
  redis.call('ZREM', RESPONSES, name)
  return redis.call('UNLINK', HOME .. 'response:' .. name)
end
if created ~= '' then
  if redis.call('HGET', KEYS[1], 'created') ~= created then
    return 0 -- the session was erased meanwhile
  end
  local life = lifetime(default)
  ttl = life > 0 and math.min(ttl, life) or ttl
end
local now = redis.call('TIME')
redis.call('SET', HOME .. 'response:' .. name, record, 'EX', ttl)
redis.call('ZADD', RESPONSES, 1000000 * now[1] + now[2], name)
redis.call('EXPIRE', RESPONSES, ttl)
for _, old in ipairs(redis.call('ZRANGE', RESPONSES, 0, -keep - 1)) do
  redis.call('ZREM', RESPONSES, old)
  redis.call('UNLINK', HOME .. 'response:' .. old)
end
return 1
