{{/*
What the cluster holds already and Kubernetes would never change: an upgrade that wants it changed is refused here, with
the way out, and not halfway by the API server. Where there is no cluster to ask (`helm template`, most GitOps tools)
lookups find nothing and nothing is refused.
*/}}

{{/*
Claims the chart makes. No workload has claim templates, which could never change: a pool that keeps files has one pod.
An entry has name, names (for its metadata), at (the values it comes from), accessMode, size and storageClassName.
*/}}
{{- define "sf.claims" -}}
{{- $claims := list -}}
{{- $shared := false -}}
{{- range $pool := (include "sf.pools" . | fromYaml).pools -}}
{{- $names := dict "component" "pool" "pool" .name -}}
{{- if .volume -}}
{{- $claims = append $claims (dict "name" (printf "%s-data" .fullname) "names" $names "at" (printf "pool '%s': persistence" .name)
  "accessMode" "ReadWriteOnce" "size" .persistence.size "storageClassName" .persistence.storageClassName) -}}
{{- end -}}
{{- with .modelCache -}}
{{- if and (eq .type "pvc") (not .existingClaim) .shared -}}
{{- $shared = true -}}
{{- else if and (eq .type "pvc") (not .existingClaim) -}}
{{- $claims = append $claims (dict "name" (printf "%s-models" $pool.fullname) "names" $names "at" (printf "pool '%s': modelCache" $pool.name)
  "accessMode" .accessMode "size" .size "storageClassName" .storageClassName) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $shared -}}
{{- with .Values.poolDefaults.modelCache -}}
{{- $claims = append $claims (dict "name" (printf "%s-models" (include "sf.fullname" $)) "names" (dict "component" "models") "at" "poolDefaults.modelCache"
  "accessMode" .accessMode "size" .size "storageClassName" .storageClassName) -}}
{{- end -}}
{{- end -}}
{{- with .Values.evaluation.postgresql -}}
{{- if and .enabled (not .existingClaim) -}}
{{- $claims = append $claims (dict "name" (printf "%s-postgresql-data" (include "sf.fullname" $)) "names" (dict "component" "postgresql")
  "at" "evaluation.postgresql" "accessMode" "ReadWriteOnce" "size" .size "storageClassName" .storageClassName) -}}
{{- end -}}
{{- end -}}
{{- dict "claims" $claims | toYaml -}}
{{- end -}}

{{- define "sf.problemsOfUpgrade" -}}
{{- $problems := list -}}
{{- $namespace := .Release.Namespace -}}
{{- range (include "sf.claims" . | fromYaml).claims -}}
{{- with include "sf.problemOfClaim" (dict "namespace" $namespace "claim" .) -}}
{{- $problems = append $problems . -}}
{{- end -}}
{{- end -}}
{{- $fullname := include "sf.fullname" . -}}
{{- $workloads := list (dict "kind" "Deployment" "name" (printf "%s-gateway" $fullname) "component" "gateway") -}}
{{- range (include "sf.pools" . | fromYaml).pools -}}
{{- $workloads = append $workloads (dict "kind" (.stateful | ternary "StatefulSet" "Deployment") "name" .fullname "component" "pool" "pool" .name) -}}
{{- end -}}
{{- if .Values.evaluation.redis.enabled -}}
{{- $workloads = append $workloads (dict "kind" "Deployment" "name" (printf "%s-redis" $fullname) "component" "redis") -}}
{{- end -}}
{{- if .Values.evaluation.postgresql.enabled -}}
{{- $workloads = append $workloads (dict "kind" "StatefulSet" "name" (printf "%s-postgresql" $fullname) "component" "postgresql") -}}
{{- end -}}
{{- range $workloads -}}
{{- with include "sf.problemOfWorkload" (merge (dict "root" $) .) -}}
{{- $problems = append $problems . -}}
{{- end -}}
{{- end -}}
{{- range $at, $service := dict "gateway.service" .Values.gateway.service "gateway.grpc.service" .Values.gateway.grpc.service -}}
{{- $name := printf "%s-%s" $fullname (eq $at "gateway.service" | ternary "gateway" "grpc") -}}
{{- $live := lookup "v1" "Service" $namespace $name | default dict -}}
{{- $class := ($live.spec | default dict).loadBalancerClass | default "" -}}
{{- if and $live (eq $service.type "LoadBalancer") (eq $live.spec.type "LoadBalancer") $service.loadBalancerClass (ne $service.loadBalancerClass $class) -}}
{{- $problems = append $problems (printf "%s.loadBalancerClass: the Service %s has the class '%s', which no load balancer changes. Set it to that, or set %s.type to ClusterIP in one upgrade and to LoadBalancer with the new class in the next; its address may change." $at $name $class $at) -}}
{{- end -}}
{{- end -}}
{{- toYaml $problems -}}
{{- end -}}

{{/* Why a claim could not become what the values say, empty when it could: dict namespace, claim. */}}
{{- define "sf.problemOfClaim" -}}
{{- $claim := .claim -}}
{{- $live := lookup "v1" "PersistentVolumeClaim" .namespace $claim.name -}}
{{- if $live -}}
{{- $move := printf "set the old value again, copy its files to a claim of your own and name it in existingClaim, or delete it with its files: kubectl --namespace %s delete persistentvolumeclaim %s" .namespace $claim.name -}}
{{- $size := $live.spec.resources.requests.storage -}}
{{- $grows := gt (include "sf.bytes" $claim.size | int64) (include "sf.bytes" $size | int64) -}}
{{- if ne (first $live.spec.accessModes) $claim.accessMode -}}
{{- printf "%s.accessMode: the claim %s is %s and cannot become %s; %s." $claim.at $claim.name (first $live.spec.accessModes) $claim.accessMode $move -}}
{{- else if and $claim.storageClassName (ne $claim.storageClassName ($live.spec.storageClassName | default "")) -}}
{{- printf "%s.storageClassName: the claim %s is of the class '%s' and cannot change to '%s'; %s." $claim.at $claim.name ($live.spec.storageClassName | default "") $claim.storageClassName $move -}}
{{- else if lt (include "sf.bytes" $claim.size | int64) (include "sf.bytes" $size | int64) -}}
{{- printf "%s.size: the claim %s has %s and cannot shrink to %s; %s." $claim.at $claim.name $size $claim.size $move -}}
{{- else if and $grows (ne ($live.status | default dict).phase "Bound") -}}
{{- printf "%s.size: the claim %s is not bound to a volume yet and can grow only then; wait for it, or delete it: kubectl --namespace %s delete persistentvolumeclaim %s." $claim.at $claim.name .namespace $claim.name -}}
{{- else if $grows -}}
{{- $class := lookup "storage.k8s.io/v1" "StorageClass" "" ($live.spec.storageClassName | default "") -}}
{{- if not ($class | default dict).allowVolumeExpansion -}}
{{- printf "%s.size: the claim %s cannot grow, because its class '%s' does not allow expansion; %s." $claim.at $claim.name ($live.spec.storageClassName | default "") $move -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Why a workload could not become what the values say, empty when it could: dict root, kind, name, component, pool (optional). */}}
{{- define "sf.problemOfWorkload" -}}
{{- $namespace := .root.Release.Namespace -}}
{{- $live := lookup "apps/v1" .kind $namespace .name -}}
{{- if $live -}}
{{- $resource := lower .kind -}}
{{- $replace := printf "kubectl --namespace %s delete %s %s --cascade=orphan" $namespace $resource .name -}}
{{- if $live.spec.volumeClaimTemplates -}}
{{- $claim := printf "%s-%s-0" (first $live.spec.volumeClaimTemplates).metadata.name .name -}}
{{- $at := empty .pool | ternary "evaluation.postgresql" "persistence of the pool" -}}
{{- printf "%s: the StatefulSet was made with claim templates by an earlier chart, and Kubernetes never changes them. Delete it without its pods (%s) and upgrade with existingClaim: %s under %s, which keeps the files." .name $replace $claim $at -}}
{{- else if ne (toJson $live.spec.selector.matchLabels) (include "sf.selectorLabels" . | fromYaml | toJson) -}}
{{- printf "%s: its selector is not the one of this chart, and Kubernetes never changes it. Delete the %s without its pods (%s), upgrade, and delete the old pods." .name .kind $replace -}}
{{- end -}}
{{- end -}}
{{- end -}}
