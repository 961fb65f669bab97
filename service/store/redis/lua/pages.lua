-- Rows of a site are stored in pages of PAGE_ROWS neighbouring slots. The hash has a field for each page that holds a
-- row; the field's name is the page number (4 bytes, little-endian). A page is one byte for each slot, 1 if the slot
-- holds a row, followed by these rows.
local PAGE_ROWS = 10
local PER_CALL = 2000 -- unpack fails from 8,000 values on

-- Call `work` with up to PER_CALL of the items at a time.
local function in_calls(items, work)
  for first = 1, #items, PER_CALL do
    work({unpack(items, first, math.min(first + PER_CALL - 1, #items))})
  end
end

-- Return the rows of a page by their offset, 0 … PAGE_ROWS - 1; no rows for `false`.
local function rows_of(page, row_bytes)
  local rows, at = {}, PAGE_ROWS
  for offset = 0, page and PAGE_ROWS - 1 or -1 do
    if string.byte(page, offset + 1) == 1 then
      rows[offset] = string.sub(page, at + 1, at + row_bytes)
      at = at + row_bytes
    end
  end
  return rows
end

-- Return the page of such rows; nil if there are none.
local function page_of(rows)
  local parts = {}
  for offset = 0, PAGE_ROWS - 1 do
    parts[offset + 1] = rows[offset] and '\1' or '\0'
  end
  for offset = 0, PAGE_ROWS - 1 do
    parts[#parts + 1] = rows[offset] or nil
  end
  return #parts > PAGE_ROWS and table.concat(parts) or nil
end

-- Pages are summed modulo 2^48: exact in a double. The sum does not depend on the order of the pages.
local SUM_RANGE = 2 ^ 48

-- Return what a page adds to the checksum of its site.
local function checksum(number, page)
  return tonumber(string.sub(redis.sha1hex(number .. page), 1, 12), 16)
end

-- Store what proves a site whole: the number of its pages and the sum of their checksums.
local function seal(site, pages, sum)
  redis.call('HSET', KEYS[1], 'pages:' .. site, pages, 'sum:' .. site, string.format('%.0f', sum))
end

-- Call `note(slot, row)` for each row that a field of an older format holds. Formats 1 and 2 hold one row in a field,
-- format 3 holds five slots, with zeros in a slot without a row.
local function rows_of_old_field(format, number, value, note)
  if format ~= '3' then
    return note(number, value)
  end
  local row_bytes = #value / 5 - 1
  for offset = 0, 4 do
    if string.byte(value, offset + 1) == 1 then
      local at = 5 + offset * row_bytes
      note(number * 5 + offset, string.sub(value, at + 1, at + row_bytes))
    end
  end
end

-- Store what proves the rows whole that the session has.
local function seal_all()
  for _, key in ipairs(rows_keys()) do
    local fields, sum = redis.call('HGETALL', key), 0
    for i = 1, #fields, 2 do
      sum = (sum + checksum(fields[i], fields[i + 1])) % SUM_RANGE
    end
    seal(string.sub(key, #HOME + #'rows:' + 1), math.max(1, #fields / 2), sum) -- a site without rows has lost them
  end
end

-- Rewrite the session in the present format.
local function upgrade(format)
  for _, key in ipairs(format == '4' and {} or rows_keys()) do
    local pages, numbers = {}, {}
    local function note(slot, row)
      local number = math.floor(slot / PAGE_ROWS)
      if not pages[number] then
        pages[number] = {}
        numbers[#numbers + 1] = number
      end
      pages[number][slot % PAGE_ROWS] = row
    end
    local fields = redis.call('HGETALL', key)
    for i = 1, #fields, 2 do
      rows_of_old_field(format, struct.unpack('<I4', fields[i]), fields[i + 1], note)
    end
    redis.call('DEL', key)
    in_calls(numbers, function(chunk)
      local values = {}
      for _, number in ipairs(chunk) do
        values[#values + 1] = struct.pack('<I4', number)
        values[#values + 1] = page_of(pages[number])
      end
      redis.call('HSET', key, unpack(values))
    end)
  end
  seal_all()
  redis.call('HSET', KEYS[1], 'format', FORMAT)
end
