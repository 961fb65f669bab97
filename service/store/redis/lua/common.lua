-- What the scripts share. KEYS[1] is a session's meta hash; its other keys are named alike and lie in the same slot.
local HOME = string.sub(KEYS[1], 1, -5)
local LOG, UNDO, ONCES = HOME .. 'log', HOME .. 'undo', HOME .. 'onces'
local FENCE, LEASE, ERASED = HOME .. 'fence', HOME .. 'lease', HOME .. 'erased'
local FORMAT = '4'
local OLD_FORMATS = {['1'] = true, ['2'] = true, ['3'] = true} -- see upgrade.lua
local DAY_S = 86400

-- Whether the session is known here: it does not exist yet, or is of this format or of one that becomes it.
local function known(format)
  return not format or format == FORMAT or OLD_FORMATS[format]
end

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

-- All that is kept of a session is forgotten `ttl_s` after its last use: the session's own option, else `default`.
local function age(default)
  local options = redis.call('HGET', KEYS[1], 'options')
  local ttl = tonumber(options and cjson.decode(options).ttl_s or default)
  if ttl > 0 or redis.call('TTL', KEYS[1]) >= 0 then -- else none of them expires
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

local function release(lease)
  if redis.call('GET', LEASE) == lease then
    redis.call('DEL', LEASE)
  end
end

-- Why the holder of `lease` ('owner:fence'; '' = nobody else can write) must not write any more; nil if it may.
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

