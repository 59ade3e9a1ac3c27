{{/* Type of a Service and what belongs to it: dict root, name, service (an entry such as gateway.service). */}}
{{- define "sf.serviceType" -}}
{{- /* A load balancer keeps the class it began with, be it from the cloud's own controller. */ -}}
{{- $live := (lookup "v1" "Service" .root.Release.Namespace .name | default dict).spec | default dict -}}
{{- $class := eq ($live.type | default "") "LoadBalancer" | ternary $live.loadBalancerClass "" -}}
{{- with .service -}}
type: {{ .type }}
{{- if ne .type "ClusterIP" }}
externalTrafficPolicy: {{ .externalTrafficPolicy }}
{{- end }}
{{- if eq .type "LoadBalancer" }}
{{- with .loadBalancerClass | default $class }}
loadBalancerClass: {{ . }}
{{- end }}
{{- with .loadBalancerSourceRanges }}
loadBalancerSourceRanges:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}
{{- end -}}

{{- define "sf.dnsEgress" -}}
{{- /* A rule counts behind the Service: OpenShift's DNS pods listen on 5353. */ -}}
- ports:
    {{- range $port := list 53 5353 }}
    - port: {{ $port }}
      protocol: UDP
    - port: {{ $port }}
      protocol: TCP
    {{- end }}
{{- end -}}

{{/* The internet without the site's own networks, on the given ports: dict root, ports. */}}
{{- define "sf.internetEgress" -}}
{{- $four := list -}}
{{- $six := list -}}
{{- range .root.Values.networkPolicy.privateNetworks -}}
{{- if contains ":" . }}{{ $six = append $six . }}{{ else }}{{ $four = append $four . }}{{ end -}}
{{- end -}}
- to:
    - ipBlock:
        cidr: 0.0.0.0/0
        {{- with $four }}
        except:
          {{- toYaml . | nindent 10 }}
        {{- end }}
    - ipBlock:
        cidr: ::/0
        {{- with $six }}
        except:
          {{- toYaml . | nindent 10 }}
        {{- end }}
  ports:
    {{- range .ports }}
    - port: {{ . }}
    {{- end }}
{{- end -}}

{{/* Port of a URL, or of `host:port`: dict url, default (where the URL's scheme has none). */}}
{{- define "sf.urlPort" -}}
{{- $host := regexReplaceAll "^[a-z]+://" .url "" | splitList "/" | first -}}
{{- $port := regexFind ":[0-9]+$" $host | trimPrefix ":" -}}
{{- $port | default .default | default (hasPrefix "https://" .url | ternary "443" "80") -}}
{{- end -}}

{{/* Where weights are fetched from: dict root, pool. */}}
{{- define "sf.hubEgress" -}}
{{- with .pool.prefetch.hubEndpoint -}}
- ports:
    - port: {{ include "sf.urlPort" (dict "url" .) }}
{{- else -}}
{{- include "sf.internetEgress" (dict "root" .root "ports" (list 443)) -}}
{{- end -}}
{{- end -}}

{{/* What a pool needs besides DNS: dict root, pool. */}}
{{- define "sf.poolEgress" -}}
{{- $values := .root.Values -}}
{{- $pool := .pool -}}
{{- $prefetch := and $pool.prefetch.enabled (not $pool.modelCache.readOnly) (not $pool.modelCache.warmUp.enabled) -}}
{{- $abroad := or (has "batch" $pool.capabilities) (has "chat" $pool.capabilities) (not $pool.offline) -}}
{{- if or (and $prefetch (not $pool.prefetch.hubEndpoint)) $abroad }}
{{ include "sf.internetEgress" (dict "root" .root "ports" ($abroad | ternary (list 80 443) (list 443))) }}
{{- end }}
{{- if or (has "batch" $pool.capabilities) (has "chat" $pool.capabilities) }}
{{- with $pool.settings.fetch_allow_networks }}
- to:
    {{- range . }}
    - ipBlock:
        cidr: {{ . }}
    {{- end }}
  ports:
    - port: 80
    - port: 443
{{- end }}
{{- end }}
{{- if and (has "batch" $pool.capabilities) $values.objectStore.url (not $values.objectStore.existingSecret) }}
{{- with $values.networkPolicy.metadataServers }}
- to:
    {{- range . }}
    - ipBlock:
        cidr: {{ . }}
    {{- end }}
  ports:
    - port: 80
    - port: 988
{{- end }}
{{- end }}
{{- $ports := list }}
{{- if and $prefetch $pool.prefetch.hubEndpoint }}
{{- $ports = append $ports (include "sf.urlPort" (dict "url" $pool.prefetch.hubEndpoint)) }}
{{- end }}
{{- with $pool.settings.otlp_endpoint }}
{{- $ports = append $ports (include "sf.urlPort" (dict "url" . "default" "4317")) }}
{{- end }}
{{- if or $values.database.existingSecret $values.redis.existingSecret }}
{{- range $values.networkPolicy.storePorts }}
{{- $ports = append $ports (toJson .) }}
{{- end }}
{{- end }}
{{- with $ports }}
- ports:
    {{- range . | uniq }}
    - port: {{ . }}
    {{- end }}
{{- end }}
{{- range $store, $port := dict "redis" 6379 "postgresql" 5432 }}
{{- if (get $values.evaluation $store).enabled }}
- to:
    - podSelector:
        matchLabels:
          {{- include "sf.selectorLabels" (dict "root" $.root "component" $store) | nindent 10 }}
  ports:
    - port: {{ $port }}
{{- end }}
{{- end }}
{{- with $values.networkPolicy.extraPoolEgress }}
{{ toYaml . }}
{{- end }}
{{- end -}}
