-- One consistent read of a session.
--
-- KEYS  the meta hash.  ARGV  'slots' to read no rows, but only where there are some.
-- Returns {meta as field, value, ...; site, its rows as records (slot, row), or their slots; site, ...}; no meta, no
-- session.
-- One string per site reads several times faster at the other end than a reply of thousands of rows.
local meta = redis.call('HGETALL', KEYS[1])
local reply = {meta}
for i = 1, #meta, 2 do
  local site = string.match(meta[i], '^site:(.*)$')
  if site then
    reply[#reply + 1] = site
    reply[#reply + 1] = table.concat(redis.call(ARGV[1] == 'slots' and 'HKEYS' or 'HGETALL', HOME .. 'rows:' .. site))
  end
end
return reply
