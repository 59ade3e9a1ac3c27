{{/* Names and labels. Selectors hold only what never changes; everything else may. */}}

{{- define "sf.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 30 | trimSuffix "-" -}}
{{- end -}}

{{/* Prefix of every object, at most 30 characters so that StatefulSet pods and their labels stay valid. */}}
{{- define "sf.fullname" -}}
{{- $name := include "sf.name" . -}}
{{- $full := .Values.fullnameOverride | default (contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name)) -}}
{{- if gt (len $full) 30 -}}
{{- printf "%s-%s" ($full | trunc 23 | trimSuffix "-") ($full | sha256sum | trunc 6) -}}
{{- else -}}
{{- $full | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "sf.chart" -}}
{{- printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" -}}
{{- end -}}

{{/* Selector labels of one component: dict root, component, pool (optional). */}}
{{- define "sf.selectorLabels" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .pool }}
search-foundation/pool: {{ . }}
{{- end }}
{{- end -}}

{{/*
All labels of one component: dict root, component, pool (optional), labels (optional), onPods (optional). Pods lack the
chart's version, which would restart them for every new chart.
*/}}
{{- define "sf.labels" -}}
{{- $standard := dict
  "app.kubernetes.io/part-of" "search-foundation"
  "app.kubernetes.io/version" .root.Chart.AppVersion
  "app.kubernetes.io/managed-by" .root.Release.Service -}}
{{- if not .onPods -}}
{{- $_ := set $standard "helm.sh/chart" (include "sf.chart" .root) -}}
{{- end -}}
{{- merge (include "sf.selectorLabels" . | fromYaml) $standard (.labels | default dict) .root.Values.commonLabels | toYaml -}}
{{- end -}}

{{/* Metadata of an object: dict root, name, component; optional pool, annotations, labels. */}}
{{- define "sf.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "sf.labels" . | nindent 2 }}
{{- with merge (dict) (.annotations | default dict) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "sf.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "sf.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{/* Put the site's registry in front of an image that names no registry: dict root, image. */}}
{{- define "sf.withRegistry" -}}
{{- $registry := .root.Values.global.imageRegistry -}}
{{- $first := regexFind "^[^/]+/" .image -}}
{{- if and $registry (not (or (contains "." $first) (contains ":" $first) (eq $first "localhost/"))) -}}
{{- printf "%s/%s" (trimSuffix "/" $registry) .image -}}
{{- else -}}
{{- .image -}}
{{- end -}}
{{- end -}}

{{/* Our image: dict root, device, own (optional: what a pool has of its own). */}}
{{- define "sf.image" -}}
{{- $image := .root.Values.image -}}
{{- $own := .own | default dict -}}
{{- $gpu := eq .device "gpu" -}}
{{- $repository := include "sf.withRegistry" (dict "root" .root "image" ($own.repository | default $image.repository)) -}}
{{- $digest := $own.digest | default (empty $own.tag | ternary ($gpu | ternary $image.cudaDigest $image.digest) "") -}}
{{- if $digest -}}
{{- printf "%s@%s" $repository $digest -}}
{{- else -}}
{{- printf "%s:%s%s" $repository ($own.tag | default $image.tag | default .root.Chart.AppVersion) ($gpu | ternary $image.cudaSuffix "") -}}
{{- end -}}
{{- end -}}

{{/* Name of the Secret that a store's URL comes from, empty when there is none: dict root, store. */}}
{{- define "sf.storeSecret" -}}
{{- $values := .root.Values -}}
{{- if eq .store "database" -}}
{{- $values.database.existingSecret | default ($values.evaluation.postgresql.enabled | ternary (printf "%s-postgresql" (include "sf.fullname" .root)) "") -}}
{{- else -}}
{{- $values.redis.existingSecret | default ($values.evaluation.redis.enabled | ternary (printf "%s-redis" (include "sf.fullname" .root)) "") -}}
{{- end -}}
{{- end -}}

{{/* Name of the Secret with hashed keys, empty when keys live in the database or there are none. */}}
{{- define "sf.keysSecret" -}}
{{- if .Values.auth.enabled -}}
{{- if .Values.auth.existingSecret -}}
{{- .Values.auth.existingSecret -}}
{{- else if or .Values.auth.keys .Values.auth.bootstrapKey.enabled -}}
{{- printf "%s-keys" (include "sf.fullname" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "sf.gatewayTlsSecret" -}}
{{- .Values.gateway.tls.existingSecret | default (printf "%s-gateway-tls" (include "sf.fullname" .)) -}}
{{- end -}}

{{/* Secret of one side of mTLS: dict root, side (gateway or pool). */}}
{{- define "sf.mtlsSecret" -}}
{{- $given := eq .side "gateway" | ternary .root.Values.mtls.gatewaySecret .root.Values.mtls.poolSecret -}}
{{- $given | default (printf "%s-%s-mtls" (include "sf.fullname" .root) .side) -}}
{{- end -}}

{{/* Port of the REST Service. */}}
{{- define "sf.restPort" -}}
{{- $port := int .Values.gateway.service.port -}}
{{- and .Values.gateway.tls.enabled (eq $port 80) | ternary 443 $port -}}
{{- end -}}

{{/* Address of the gateway inside the cluster. */}}
{{- define "sf.gatewayUrl" -}}
{{- $scheme := .Values.gateway.tls.enabled | ternary "https" "http" -}}
{{- printf "%s://%s-gateway.%s.svc.%s:%s" $scheme (include "sf.fullname" .) .Release.Namespace .Values.clusterDomain (include "sf.restPort" .) -}}
{{- end -}}

{{/* A quantity in bytes. */}}
{{- define "sf.bytes" -}}
{{- $text := toString . -}}
{{- $unit := regexFind "[A-Za-z]+$" $text -}}
{{- $units := dict "" 1.0 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "m" 1e-3 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 "Ei" 1152921504606846976.0 -}}
{{- mulf (float64 (trimSuffix $unit $text)) (get $units $unit | default 1.0) | int64 -}}
{{- end -}}
