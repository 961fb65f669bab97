-- The beginning of a turn: what the session is, and for a turn that may write, the lease that its commit needs.
--
-- KEYS  the meta hash.  ARGV  owner, lease in ms, lease wanted ('always', 'unless predict' by the session's options,
--       'never'), default ttl, then the names under which the request may have been answered before.
-- Returns {'again', the record of that answer}, {'busy', ms until the lease ends}, or
--         {'entered', lease or '', meta as field, value, ...}.
local owner, lease_ms, wanted, ttl = unpack(ARGV, 1, 4)
for i = 5, #ARGV do
  local record = redis.call('GET', HOME .. 'once:' .. ARGV[i])
  if record then
    return {'again', record}
  end
end
local stored = redis.call('HMGET', KEYS[1], 'format', 'options')
local reads = wanted == 'never' or not known(stored[1])
if wanted == 'unless predict' and stored[2] then
  reads = reads or cjson.decode(stored[2]).adapt == 'predict'
end
local lease = ''
if not reads then
  local held = redis.call('GET', LEASE)
  if held and string.sub(held, 1, #owner + 1) ~= owner .. ':' then
    return {'busy', tostring(redis.call('PTTL', LEASE))}
  end
  lease = owner .. ':' .. redis.call('INCR', FENCE)
  redis.call('SET', LEASE, lease, 'PX', lease_ms)
  if not stored[1] then
    redis.call('EXPIRE', FENCE, DAY_S) -- no session keeps it yet, and perhaps none ever will
  end
end
if stored[1] and known(stored[1]) then
  age(ttl)
end
return {'entered', lease, unpack(redis.call('HGETALL', KEYS[1]))}
