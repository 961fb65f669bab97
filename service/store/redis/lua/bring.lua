-- Store a whole session: one that was archived, or one of a backup.
--
-- KEYS  the meta hash.  ARGV  what must be stored now: the field `archived` of a stub, '' = no session, '*' = anything,
--       which is erased; default ttl; then for each hash and the log: the last part of its key's name, number of
--       fields and values, field, value, ...
-- Returns 'done', or 'changed' if something else is stored.
local PER_CALL = 2000 -- an even number; unpack fails from 8,000 values on
local expected, ttl = ARGV[1], ARGV[2]
local exists = redis.call('EXISTS', KEYS[1], LOG, UNDO) > 0
local changed = expected == '' and exists
if expected ~= '' and expected ~= '*' then
  changed = redis.call('HGET', KEYS[1], 'archived') ~= expected
end
if changed then
  return 'changed'
end
local life = redis.call('PTTL', KEYS[1])
if expected == '*' and exists then
  erase()
end
local at = 3
while at <= #ARGV do
  local name, last = ARGV[at], at + 1 + tonumber(ARGV[at + 1])
  if name ~= 'meta' then
    redis.call('UNLINK', HOME .. name)
  end
  for first = at + 2, last, PER_CALL do
    local upto = math.min(first + PER_CALL - 1, last)
    if name == 'log' then
      redis.call('RPUSH', LOG, unpack(ARGV, first, upto))
    else
      redis.call('HSET', HOME .. name, unpack(ARGV, first, upto))
    end
  end
  if life > 0 then
    redis.call('PEXPIRE', HOME .. name, life)
  end
  at = last + 1
end
redis.call('HDEL', KEYS[1], 'archived')
redis.call('HSET', KEYS[1], 'brought', redis.call('TIME')[1]) -- the session counts as used
if expected == '' or expected == '*' then
  age(ttl)
end
return 'done'
