-- Lets only known headers through, gives each request its id and the path that the services know, and writes errors
-- that services describe in metadata as HTTP answers.
-- The renderer puts before this file: STATUS, gRPC status -> {status, body, retry_after} for errors that come without
-- a description, beside the body those that routes name as their form; KNOWN, the names of headers that are let
-- through; KEY_HEADERS, those beside authorization that may hold a key.

local find, format, byte, sub = string.find, string.format, string.byte, string.sub

local PASSED_ON = {
  "content-range", "retry-after", "server-timing", "x-ratelimit-remaining-requests",
  "x-ratelimit-remaining-tokens",
}
local COLON, SLASH = 58, 47

local random = assert(io.open("/dev/urandom", "rb"))
random:setvbuf("full", 4096)

local HEX_16 = string.rep("%02x", 16)

-- The services' side is gRPC, where names as grpc-timeout or foo-bin, and bytes beyond ASCII, mean something else or
-- nothing at all.
local function let_known_through(headers)
  local others
  for name, value in pairs(headers) do
    if byte(name) ~= COLON and (not KNOWN[name] or find(value, "[^\t -~]")) then
      others = others or {}
      others[#others + 1] = name
    end
  end
  if others ~= nil then
    for _, name in ipairs(others) do
      headers:remove(name)
      if name == "authorization" then
        headers:add(name, "?") -- no key that anybody has, rather than none
      end
    end
  end
end

-- Other vendors' clients send their keys otherwise, some of them in the query, which then stays here.
local function key_as_bearer(headers)
  if headers:get("authorization") ~= nil then
    return
  end
  for _, name in ipairs(KEY_HEADERS) do
    local key = headers:get(name)
    if key ~= nil and key ~= "" then
      headers:add("authorization", "Bearer " .. key)
      return
    end
  end
  local path = headers:get(":path")
  local query = find(path, "?", 1, true)
  local key = query and string.match(path, "[?&]key=([^&]+)", query)
  if key ~= nil and (find(path, "^/v1beta/") or find(path, "^/v1/models/")) then
    headers:add("authorization", "Bearer " .. key)
    headers:replace(":path", sub(path, 1, query - 1))
  end
end

-- Routes take one slash at the end of a path; the transcoder behind this does not.
local function without_last_slash(headers)
  local path = headers:get(":path")
  local query = find(path, "?", 1, true)
  local last = query and query - 1 or #path
  if last > 1 and byte(path, last) == SLASH then
    headers:replace(":path", sub(path, 1, last - 1) .. sub(path, last + 1))
  end
end

-- The filters before this have unpacked what they can, and have said so by taking the header away.
local function still_packed(headers)
  local coding = headers:get("content-encoding")
  return coding ~= nil and coding ~= "" and string.lower(coding) ~= "identity"
end

function envoy_on_request(handle)
  local headers = handle:headers()
  key_as_bearer(headers)
  let_known_through(headers)
  without_last_slash(headers)
  local id = headers:get("x-request-id")
  if id == nil or id == "" or #id > 128 or find(id, "[^%w%-._:/+=@]") then
    headers:replace("x-request-id", format(HEX_16, byte(random:read(16), 1, 16)))
  end
  if still_packed(headers) then
    handle:respond({ [":status"] = "415" })
  end
end

local function described(map)
  return map:get("sf-http-status"), map:get("sf-http-body")
end

-- An answer whose status or length the transcoder does not know: a file, a part of one, an answer without a body.
local function as_told(headers, length)
  local status = headers:get("sf-http-status")
  if status ~= nil then
    headers:replace(":status", status)
    headers:remove("sf-http-status")
  end
  headers:remove("sf-content-length")
  if status == "304" then
    headers:remove("content-length")
    headers:remove("content-type")
  else
    headers:replace("content-length", length)
  end
end

-- A service's error is a non-OK gRPC status. It stands in the headers: alone there when the service sent nothing
-- before it, or copied by the transcoder from the trailers, which still hold the rest.
function envoy_on_response(handle)
  local headers = handle:headers()
  if headers:get(":status") ~= "415" then
    headers:remove("accept-encoding") -- of gRPC servers
  end
  local grpc_status = headers:get("grpc-status")
  if grpc_status == nil or grpc_status == "0" then
    local length = headers:get("sf-content-length")
    if length ~= nil then
      as_told(headers, length)
    end
    return
  end
  handle:body(true)
  local trailers = handle:trailers()
  headers = handle:headers()
  local status, text = described(headers)
  if trailers ~= nil then
    if text == nil then
      status, text = described(trailers)
    end
    for _, name in ipairs(PASSED_ON) do
      local value = trailers:get(name)
      if value ~= nil then
        headers:replace(name, value)
      end
    end
  end
  if status == nil or text == nil then
    local reply = STATUS[tonumber(grpc_status)] or STATUS[2]
    status = reply.status
    local form = handle:metadata():get("form")
    text = format(reply[form] or reply.body, headers:get("x-request-id") or "")
    if reply.retry_after ~= nil and headers:get("retry-after") == nil then
      headers:replace("retry-after", reply.retry_after)
    end
  end
  handle:body(true):setBytes(text)
  headers:replace(":status", status)
  headers:replace("content-type", "application/json")
  headers:replace("content-length", tostring(#text))
  headers:remove("sf-http-status")
  headers:remove("sf-http-body")
end
