-- Keep, return or erase a response that clients may continue.
--
-- KEYS  the meta hash of the response's session; of a response of no session, the name that such a hash would have.
-- ARGV  'put', name, record, its ttl, responses to keep, default ttl of sessions, `created` of the session or '',
--              and perhaps the name of the newest response, which this one goes on with, or ''; or
--       'get', name or '' for the newest response; or
--       'delete', name.
-- Returns of 'put' whether the response is kept, or -1 if another response is the newest one; of 'get' the record or
-- nil; of 'delete' whether there was a response.
local verb, name, record, ttl, keep, default, created, after = unpack(ARGV)
local newest, written = unpack(redis.call('ZRANGE', RESPONSES, -1, -1, 'WITHSCORES'))
if verb == 'get' then
  name = name ~= '' and name or newest
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
if after then
  if redis.call('EXISTS', HOME .. 'response:' .. name) == 1 then
    return 1
  end
  local exists = newest and redis.call('EXISTS', HOME .. 'response:' .. newest) == 1
  if (exists and newest or '') ~= after then
    return -1
  end
end
local now = redis.call('TIME')
local score = math.max(1000000 * now[1] + now[2], tonumber(written or 0) + 1) -- a clock may be set back
redis.call('SET', HOME .. 'response:' .. name, record, 'EX', ttl)
redis.call('ZADD', RESPONSES, score, name)
redis.call('EXPIRE', RESPONSES, ttl)
for _, old in ipairs(redis.call('ZRANGE', RESPONSES, 0, -keep - 1)) do
  redis.call('ZREM', RESPONSES, old)
  redis.call('UNLINK', HOME .. 'response:' .. old)
end
return 1
