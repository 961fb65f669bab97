-- Names and functions that the scripts share. KEYS[1] is a session's meta hash; the session's other keys have the same
-- prefix, and lie in the same hash slot of a cluster.
local HOME = string.sub(KEYS[1], 1, -5)
local LOG, UNDO, ONCES = HOME .. 'log', HOME .. 'undo', HOME .. 'onces'
local FENCE, LEASE, ERASED, RESPONSES = HOME .. 'fence', HOME .. 'lease', HOME .. 'erased', HOME .. 'responses'
local ARCHIVING = HOME .. 'archiving'
local FORMAT = '5'
local ARCHIVED = 'archived' -- the format of a stub
local OLD_FORMATS = {['1'] = true, ['2'] = true, ['3'] = true, ['4'] = true} -- see upgrade.lua
local DAY_S = 86400

-- Return whether this release knows the session's format, or there is no session.
local function known(format)
  return not format or format == FORMAT or format == ARCHIVED or OLD_FORMATS[format]
end

-- Return the names of the keys that hold the session's rows.
local function rows_keys()
  local keys = {}
  for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
    local site = string.match(field, '^site:(.*)$')
    if site then
      keys[#keys + 1] = HOME .. 'rows:' .. site
    end
  end
  return keys
end

-- Return what is missing of a session of the present format, else nil. Only keys are counted; a load compares checksums.
local function missing()
  local format = redis.call('HGET', KEYS[1], 'format')
  if not format then
    return redis.call('EXISTS', LOG, UNDO) > 0 and 'its meta' or nil
  end
  for _, field in ipairs(format == FORMAT and redis.call('HKEYS', KEYS[1]) or {}) do
    local site = string.match(field, '^pages:(.*)$')
    if site then
      local expected = tonumber(redis.call('HGET', KEYS[1], field))
      local found = redis.call('HLEN', HOME .. 'rows:' .. site)
      if found ~= expected then
        return 'pages of rows at site ' .. site .. ': it has ' .. found .. ' of ' .. expected
      end
    end
  end
  local logged = tonumber(redis.call('HGET', KEYS[1], 'logged') or 0)
  local found = redis.call('LLEN', LOG)
  if found < logged then
    return 'entries of its log: it has ' .. found .. ' of ' .. logged
  end
end

-- Return the seconds after its last use at which the session expires: its own option `ttl_s`, else `default`; 0 = never.
local function lifetime(default)
  local options = redis.call('HGET', KEYS[1], 'options')
  return tonumber(options and cjson.decode(options).ttl_s or default)
end

-- Restart the time after which all keys of the session but its recorded answers expire.
local function age(default)
  local ttl = lifetime(default)
  if ttl > 0 or redis.call('TTL', KEYS[1]) >= 0 then -- else no key of the session expires
    local keys = rows_keys()
    for _, key in ipairs({KEYS[1], LOG, UNDO, ONCES}) do
      keys[#keys + 1] = key
    end
    for _, key in ipairs(keys) do
      if ttl > 0 then
        redis.call('EXPIRE', key, ttl)
      else
        redis.call('PERSIST', key)
      end
    end
  end
  if ttl > 0 then
    redis.call('EXPIRE', FENCE, ttl + DAY_S)
  else
    redis.call('PERSIST', FENCE)
  end
end

-- Erase the kept responses.
local function drop_responses()
  for _, name in ipairs(redis.call('ZRANGE', RESPONSES, 0, -1)) do
    redis.call('UNLINK', HOME .. 'response:' .. name)
  end
  redis.call('UNLINK', RESPONSES)
end

-- Give the lease back if it is still held.
local function release(lease)
  if redis.call('GET', LEASE) == lease then
    redis.call('DEL', LEASE)
  end
end

-- Return {verdict, fence} if the holder of `lease` ('owner:fence'; '' = nobody else can write) must not write any more,
-- else nil.
local function fenced(lease)
  if lease == '' then
    return nil
  end
  local fence = tonumber(string.match(lease, ':(%d+)$'))
  local erased = tonumber(redis.call('GET', ERASED) or 0)
  if erased > fence then
    return {'erased', tostring(erased)}
  end
  local newest = redis.call('GET', FENCE) or '0'
  if tonumber(newest) ~= fence then
    return {'fenced', newest}
  end
end

-- Erase every key of the session, and leave a tombstone: a lease from before neither commits nor creates the session.
local function erase()
  redis.call('SET', ERASED, redis.call('INCR', FENCE), 'EX', DAY_S)
  redis.call('EXPIRE', FENCE, DAY_S)
  for _, key in ipairs(rows_keys()) do
    redis.call('UNLINK', key)
  end
  for _, once in ipairs(redis.call('ZRANGE', ONCES, 0, -1)) do
    redis.call('UNLINK', HOME .. 'once:' .. once)
  end
  drop_responses()
  redis.call('UNLINK', LOG, UNDO, ONCES, LEASE, ARCHIVING, KEYS[1])
end

