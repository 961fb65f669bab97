-- Take one session from version v to v+1: all of the step or nothing.
--
-- KEYS  the meta hash.
-- ARGV  version v, created, nonce, lease or '', default ttl, undo steps to keep, bytes of undo steps to keep, log
--       entries to keep, log entry or '', text or '', name of the idempotency record or '', its ttl, the record,
--       'responses' to erase the kept responses, 'answers' to erase the remembered answers too, or '', options, number of meta fields and values, field, value, ...,
--       then for each touched site: its name, its row_bytes, its rows as records (slot, row), slots to empty.
-- Returns {verdict, detail}. Only 'done' has written anything; the other verdicts are 'format', 'fenced', 'erased',
-- 'conflict', 'renewed', 'width', 'damaged' and 'archived'.
local version, created, nonce, lease, ttl = unpack(ARGV, 1, 5)
local keep, keep_bytes, keep_log, entry, text = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8], ARGV[9], ARGV[10]
local once, once_ttl, record, drops, options = unpack(ARGV, 11, 15)
local FIRST_VALUE = 17
local ERASED_ANSWER = 'erased at ' -- then the version, as in answers.py
local first_site = FIRST_VALUE + tonumber(ARGV[16])
local SLOT_BYTES = 4

local stored = redis.call('HMGET', KEYS[1], 'format', 'version', 'created', 'nonce', 'undo_from', 'undo_bytes')
if not known(stored[1]) then
  return {'format', stored[1]}
end
if stored[4] == nonce then
  return {'done', version} -- an earlier attempt of this commit has landed, and its reply was lost
end
local stale = fenced(lease)
if stale then
  return stale
end
if stored[1] == ARCHIVED then
  return {'archived', stored[2]}
end
if (stored[2] or '0') ~= version then
  return {'conflict', stored[2] or '0'}
end
if stored[3] and stored[3] ~= created then
  return {'renewed', stored[2]}
end
for site = first_site, #ARGV, 4 do
  local row_bytes = redis.call('HGET', KEYS[1], 'site:' .. ARGV[site])
  if row_bytes and row_bytes ~= ARGV[site + 1] then
    return {'width', ARGV[site] .. ' are ' .. row_bytes .. ' bytes each, not ' .. ARGV[site + 1]}
  end
end

if OLD_FORMATS[stored[1]] then
  upgrade(stored[1])
end
local damage = missing()
if damage then
  return {'damaged', damage}
end

-- Return the parts in one string, each behind its length.
local function packed(parts)
  for i, part in ipairs(parts) do
    parts[i] = struct.pack('<I4', #part) .. part
  end
  return table.concat(parts)
end

-- The undo step: the rows that are replaced, the slots that were empty, and the meta values that are replaced.
local undo_rows, undo_meta = {}, {}

-- Return the changes by page and offset (a row, or false for a slot to empty), and the numbers of the pages.
local function changes_of(row_bytes, records, cleared)
  local changes, pages = {}, {}
  local function note(slot, row)
    local number = struct.unpack('<I4', slot)
    local page = math.floor(number / PAGE_ROWS)
    if not changes[page] then
      changes[page] = {}
      pages[#pages + 1] = page
    end
    changes[page][number % PAGE_ROWS] = row
  end
  for at = 1, #records, SLOT_BYTES + row_bytes do
    local row = at + SLOT_BYTES
    note(string.sub(records, at, row - 1), string.sub(records, row, row + row_bytes - 1))
  end
  for at = 1, #cleared, SLOT_BYTES do
    note(string.sub(cleared, at, at + SLOT_BYTES - 1), false)
  end
  return changes, pages
end

-- Write a site; return the records of the rows that were replaced, and the slots that were empty.
local function write_site(site, key, row_bytes, records, cleared)
  local old, empty = {}, {}
  local count = tonumber(redis.call('HGET', KEYS[1], 'pages:' .. site) or 0)
  local sum = tonumber(redis.call('HGET', KEYS[1], 'sum:' .. site) or 0)
  local changes, pages = changes_of(row_bytes, records, cleared)
  in_calls(pages, function(chunk)
    local fields, written, emptied = {}, {}, {}
    for i, page in ipairs(chunk) do
      fields[i] = struct.pack('<I4', page)
    end
    for i, page in ipairs(redis.call('HMGET', key, unpack(fields))) do
      local rows = rows_of(page, row_bytes)
      if page then
        count, sum = count - 1, (sum - checksum(fields[i], page)) % SUM_RANGE
      end
      for offset, row in pairs(changes[chunk[i]]) do
        local slot = struct.pack('<I4', chunk[i] * PAGE_ROWS + offset)
        if rows[offset] then
          old[#old + 1] = slot .. rows[offset]
        else
          empty[#empty + 1] = slot
        end
        rows[offset] = row
      end
      local new = page_of(rows)
      if new then
        written[#written + 1], written[#written + 2] = fields[i], new
        count, sum = count + 1, (sum + checksum(fields[i], new)) % SUM_RANGE
      else
        emptied[#emptied + 1] = fields[i]
      end
    end
    if #written > 0 then
      redis.call('HSET', key, unpack(written))
    end
    if #emptied > 0 then
      redis.call('HDEL', key, unpack(emptied))
    end
  end)
  seal(site, count, sum)
  return table.concat(old), table.concat(empty)
end

local fields, values = {}, {'format', FORMAT, 'nonce', nonce}
for i = FIRST_VALUE, first_site - 1, 2 do
  fields[#fields + 1] = ARGV[i]
end
for i, old in ipairs(redis.call('HMGET', KEYS[1], unpack(fields))) do
  local value = ARGV[FIRST_VALUE + 2 * i - 1]
  if old ~= value then
    values[#values + 1], values[#values + 2] = fields[i], value
    if old then
      undo_meta[#undo_meta + 1], undo_meta[#undo_meta + 2] = fields[i], old
    end
  end
end
redis.call('HSET', KEYS[1], unpack(values))
redis.call('HSETNX', KEYS[1], 'options', options)
for site = first_site, #ARGV, 4 do
  local name, row_bytes, key = ARGV[site], ARGV[site + 1], HOME .. 'rows:' .. ARGV[site]
  if redis.call('HEXISTS', KEYS[1], 'site:' .. name) == 0 then
    redis.call('UNLINK', key) -- what is left of an earlier session whose other keys the server has lost
  end
  local old, empty = write_site(name, key, tonumber(row_bytes), ARGV[site + 2], ARGV[site + 3])
  for _, part in ipairs({name, row_bytes, old, empty}) do
    undo_rows[#undo_rows + 1] = part
  end
  if redis.call('EXISTS', key) == 1 then
    redis.call('HSETNX', KEYS[1], 'site:' .. name, row_bytes)
  else
    redis.call('HDEL', KEYS[1], 'site:' .. name, 'pages:' .. name, 'sum:' .. name)
  end
end

local new, from, bytes = tonumber(version) + 1, tonumber(stored[5] or version), tonumber(stored[6] or 0)
if keep > 0 then
  local parts = {new .. ':rows', packed(undo_rows), new .. ':meta', packed(undo_meta)}
  bytes = bytes + #parts[2] + #parts[4] + #text
  if text ~= '' then
    parts[5], parts[6] = new .. ':text', text
  end
  redis.call('HSET', UNDO, unpack(parts))
end
while from < new and (new - from > keep or bytes > keep_bytes) do
  from = from + 1
  for _, part in ipairs({':rows', ':meta', ':text'}) do
    bytes = bytes - redis.call('HSTRLEN', UNDO, from .. part)
    redis.call('HDEL', UNDO, from .. part)
  end
end
redis.call('HSET', KEYS[1], 'undo_from', from, 'undo_bytes', bytes)
if entry ~= '' then
  redis.call('RPUSH', LOG, entry)
  redis.call('LTRIM', LOG, '-' .. keep_log, -1)
  redis.call('HSET', KEYS[1], 'logged', redis.call('LLEN', LOG))
end
local now = tonumber(redis.call('TIME')[1])
local until_s = tonumber(redis.call('HGET', KEYS[1], 'once_until') or 0)
if until_s > now and redis.call('EXISTS', ONCES) == 0 then
  redis.call('HSET', KEYS[1], 'once_lost', until_s) -- until then nobody knows which requests were answered
end
redis.call('ZREMRANGEBYSCORE', ONCES, '-inf', now)
if drops == 'answers' then
  for _, name in ipairs(redis.call('ZRANGE', ONCES, 0, -1)) do -- the requests stay known, or a retry would be learned
    redis.call('SET', HOME .. 'once:' .. name, ERASED_ANSWER .. new, 'XX', 'KEEPTTL')
  end
end
if once ~= '' then
  local life = lifetime(ttl)
  once_ttl = life > 0 and math.min(once_ttl, life) or once_ttl -- no answer outlives the session
  redis.call('HSET', KEYS[1], 'once_until', math.max(until_s, now + once_ttl))
  redis.call('SET', HOME .. 'once:' .. once, record, 'EX', once_ttl)
  redis.call('ZADD', ONCES, now + once_ttl, once)
end
if drops ~= '' then
  drop_responses()
end
age(ttl)
release(lease)
return {'done', version}
