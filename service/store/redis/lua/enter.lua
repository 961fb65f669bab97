-- Begin a turn: return the recorded answer, or else the session and, for a turn that may write, a lease.
--
-- KEYS  the meta hash.  ARGV  owner, duration of the lease in ms, when to take a lease ('always', 'unless predict' is
--       the session's option `adapt`, 'never'), default ttl, a lease whose owner is dead or '', then the names under which an answer may be
--       recorded.
-- Returns {'again', the record}, {'busy', ms until another owner's lease ends, the lease}, {'damaged', what is
--         missing}, {'archived'} if a stub is all that is here, or
--         {'entered', lease or '', the meta hash as field, value, ...}.
local owner, lease_ms, wanted, ttl, dead = unpack(ARGV, 1, 5)
local now = tonumber(redis.call('TIME')[1])
local stored = redis.call('HMGET', KEYS[1], 'format', 'options', 'once_until', 'once_lost')
for i = 6, #ARGV do
  local record = redis.call('GET', HOME .. 'once:' .. ARGV[i])
  if record then
    return {'again', record}
  end
  if tonumber(redis.call('ZSCORE', ONCES, ARGV[i]) or 0) > now then
    return {'damaged', 'the answer to this request, which was committed before'}
  end
end
local no_onces = tonumber(stored[3] or 0) > now and redis.call('EXISTS', ONCES) == 0
if #ARGV > 5 and (no_onces or tonumber(stored[4] or 0) > now) then
  return {'damaged', 'the names of the requests that were answered'}
end
if stored[1] == ARCHIVED then
  return {'archived'}
end
local damage = missing()
if damage then
  return {'damaged', damage}
end
local reads = wanted == 'never' or not known(stored[1])
if wanted == 'unless predict' and stored[2] then
  reads = reads or cjson.decode(stored[2]).adapt == 'predict'
end
local lease = ''
if not reads then
  local held = redis.call('GET', LEASE)
  if held and held ~= dead and string.sub(held, 1, #owner + 1) ~= owner .. ':' then
    return {'busy', tostring(redis.call('PTTL', LEASE)), held}
  end
  lease = owner .. ':' .. redis.call('INCR', FENCE)
  redis.call('SET', LEASE, lease, 'PX', lease_ms)
  if not stored[1] then
    redis.call('EXPIRE', FENCE, DAY_S) -- there is no session yet whose ttl could end the fence
  end
end
if stored[1] and known(stored[1]) then
  pcall(age, ttl) -- a server that takes no writes can still be read
end
return {'entered', lease, unpack(redis.call('HGETALL', KEYS[1]))}
