-- The step from version v to v+1 of one session: all of it or nothing.
--
-- KEYS  the meta hash, then the row hash of each touched site.
-- ARGV  format, version v, created, nonce, options, number of meta values, field, value, ...,
--       then for each touched site: its name, its row_bytes, its rows as records (slot, row).
-- Returns {verdict, detail}; whatever the verdict, nothing is written unless it is 'done'.
local format, version, created, nonce, options, values = unpack(ARGV, 1, 6)
local first_site = 7 + tonumber(values)
local SLOT_BYTES = 4
local ROWS_PER_CALL = 2000 -- unpack fails from 8,000 values on

local stored = redis.call('HMGET', KEYS[1], 'format', 'version', 'created', 'nonce')
if stored[1] and stored[1] ~= format then
  return {'format', stored[1]}
end
if stored[4] == nonce then
  return {'done', version} -- this very commit has landed before, and only its reply was lost
end
if (stored[2] or '0') ~= version then
  return {'conflict', stored[2] or '0'}
end
if stored[3] and stored[3] ~= created then
  return {'renewed', stored[2]}
end
for site = first_site, #ARGV, 3 do
  local row_bytes = redis.call('HGET', KEYS[1], 'site:' .. ARGV[site])
  if row_bytes and row_bytes ~= ARGV[site + 1] then
    return {'width', ARGV[site] .. ' are ' .. row_bytes .. ' bytes each, not ' .. ARGV[site + 1]}
  end
end

redis.call('HSET', KEYS[1], 'format', format, 'nonce', nonce, unpack(ARGV, 7, first_site - 1))
redis.call('HSETNX', KEYS[1], 'options', options)
for site = first_site, #ARGV, 3 do
  local key, row_bytes, records = KEYS[2 + (site - first_site) / 3], tonumber(ARGV[site + 1]), ARGV[site + 2]
  local width = SLOT_BYTES + row_bytes
  redis.call('HSET', KEYS[1], 'site:' .. ARGV[site], row_bytes)
  for first = 1, #records, ROWS_PER_CALL * width do
    local last = math.min(first + ROWS_PER_CALL * width, #records + 1) - width
    local cells = {}
    for at = first, last, width do
      cells[#cells + 1] = string.sub(records, at, at + SLOT_BYTES - 1)
      cells[#cells + 1] = string.sub(records, at + SLOT_BYTES, at + width - 1)
    end
    redis.call('HSET', key, unpack(cells))
  end
end
return {'done', version}
