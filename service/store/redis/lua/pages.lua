-- The rows of a site, in pages of PAGE_ROWS neighbouring slots: a field for each page that holds a row, named by its
-- number (4 bytes, little-endian). A page is a byte for each slot, 1 if it holds a row, then these rows.
local PAGE_ROWS = 10
local PER_CALL = 2000 -- unpack fails from 8,000 values on

-- Calls `work` with up to PER_CALL of the items at a time.
local function in_calls(items, work)
  for first = 1, #items, PER_CALL do
    work({unpack(items, first, math.min(first + PER_CALL - 1, #items))})
  end
end

-- The rows of a page, or of none (false), by place 0 … PAGE_ROWS - 1.
local function rows_of(page, row_bytes)
  local rows, at = {}, PAGE_ROWS
  for place = 0, page and PAGE_ROWS - 1 or -1 do
    if string.byte(page, place + 1) == 1 then
      rows[place] = string.sub(page, at + 1, at + row_bytes)
      at = at + row_bytes
    end
  end
  return rows
end

-- The page of such rows; nil if there are none.
local function page_of(rows)
  local parts = {}
  for place = 0, PAGE_ROWS - 1 do
    parts[place + 1] = rows[place] and '\1' or '\0'
  end
  for place = 0, PAGE_ROWS - 1 do
    parts[#parts + 1] = rows[place] or nil
  end
  return #parts > PAGE_ROWS and table.concat(parts) or nil
end

-- Calls `note` with slot and row for all that a field of an older format holds: a row, or (format 3) 5 of them, zeros
-- where there is none.
local function rows_before(format, number, value, note)
  if format ~= '3' then
    return note(number, value)
  end
  local row_bytes = #value / 5 - 1
  for place = 0, 4 do
    if string.byte(value, place + 1) == 1 then
      local at = 5 + place * row_bytes
      note(number * 5 + place, string.sub(value, at + 1, at + row_bytes))
    end
  end
end

-- Takes a session of an older format over.
local function upgrade(format)
  for _, key in ipairs(rows_keys()) do
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
      rows_before(format, struct.unpack('<I4', fields[i]), fields[i + 1], note)
    end
    redis.call('DEL', key)
    in_calls(numbers, function(some)
      local values = {}
      for _, number in ipairs(some) do
        values[#values + 1] = struct.pack('<I4', number)
        values[#values + 1] = page_of(pages[number])
      end
      redis.call('HSET', key, unpack(values))
    end)
  end
  redis.call('HSET', KEYS[1], 'format', FORMAT)
end
